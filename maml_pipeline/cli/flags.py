"""Flags of the commands beside training."""

import argparse
from pathlib import Path
from typing import NoReturn

from maml_pipeline.errors import UserError


def path_argument(text: str) -> Path:
    """Return a path; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder or a file")
    return Path(text)


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are a line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as a `UserError`."""
        raise UserError(message.removeprefix("argument "))
