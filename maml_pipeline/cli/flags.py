"""The parsers of commands with flags of their own, and what every parser here has in common."""

import argparse
from pathlib import Path
from typing import NoReturn

import jsonargparse

from maml_pipeline.cli.parser_messages import one_line
from maml_pipeline.errors import UserError


class OneLineErrors:
    """Makes a parser's errors a line each, without the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong as a `UserError`."""
        raise UserError(one_line(message) + self.suggestion(message))

    def suggestion(self, message: str) -> str:
        """Name what may have been meant, to follow the message."""
        return ""


class FlagParser(OneLineErrors, argparse.ArgumentParser):
    """The parser of a command with flags of its own."""


class TypedFlagParser(OneLineErrors, jsonargparse.ArgumentParser):
    """The same with typed flags."""


def path_argument(text: str) -> Path:
    """Convert a flag's value to a path, which must have a name."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder or a file")
    return Path(text)
