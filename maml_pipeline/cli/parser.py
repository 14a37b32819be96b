"""The parser that every command uses or extends: one-line errors, and help in one layout."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from maml_pipeline.cli.parser_messages import one_line
from maml_pipeline.errors import UserError

HELP_COLUMN = 34
"""Column at which the texts of a command's help start."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a `UserError` of one line, and shows examples in its help.

    Args:
        examples: Commands that work as typed, to show below the description.
        kwargs: As for `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**defaults | kwargs)
        self.examples = examples

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return usage, description, examples, keys and epilog."""
        text, epilog, usage = self.description, self.epilog, self.usage
        width = _width()
        paragraphs = [textwrap.fill(text, width)] if text else []
        if self.examples:
            title = "example:" if len(self.examples) == 1 else "examples:"
            paragraphs.append("\n".join([title, *(f"  {example}" for example in self.examples)]))
        try:
            if usage:
                indent = " " * len("usage: ")
                self.usage = textwrap.fill(usage, width - len(indent), subsequent_indent=indent)
            self.description = "\n\n".join(paragraphs) or None
            self.epilog = "\n".join(textwrap.fill(line, width) for line in (epilog or "").split("\n"))
            shown = super().format_help(*args, **kwargs).replace(" [-h]", "", 1)
            return re.sub(r" +$", "", shown, flags=re.M)
        finally:
            self.description, self.epilog, self.usage = text, epilog, usage

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a message of argparse or jsonargparse as a `UserError`."""
        raise UserError(one_line(message))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formats help for the width of the terminal, between the lines of `Parser.format_help`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=_width())


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120) - 2


def path_argument(text: str) -> Path:
    """Convert a flag's value to a path; an empty one is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder or a file")
    return Path(text)
