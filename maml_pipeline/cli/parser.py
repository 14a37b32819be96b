"""The parser that every command's parser is, or extends: errors of one line."""

import argparse
from pathlib import Path
from typing import NoReturn

from maml_pipeline.cli.parser_messages import one_line
from maml_pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors as a `UserError` of one line, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a message of argparse or jsonargparse as a `UserError`."""
        raise UserError(one_line(message) + self.suggestion(message))

    def suggestion(self, message: str) -> str:
        """Return what the user may have meant, to append to an error message."""
        return ""


def path_argument(text: str) -> Path:
    """Convert a flag's value to a path; an empty one is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder or a file")
    return Path(text)
