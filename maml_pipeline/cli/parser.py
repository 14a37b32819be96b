"""The parser of `maml fit | validate | test`: Lightning's, with errors of one or two lines."""

import difflib
import re
import sys
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.text import printable


class MamlParser(LightningArgumentParser):
    """A parser whose errors are one or two lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong without the whole usage, and exit with status 2."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        sys.stderr.write(f"maml: error: {printable(' '.join(lines))}{self._suggestion(message)}\n")
        sys.exit(2)

    def _suggestion(self, message: str) -> str:
        """Name the keys that come closest to one that does not exist."""
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
        if unknown is None:
            return ""
        key = unknown[1] or unknown[2]
        parsers = [self]
        if self._subcommands_action is not None:
            parsers += self._subcommands_action._name_parser_map.values()
        keys = [action.dest for parser in parsers for action in parser._actions]
        close = difflib.get_close_matches(key, keys, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else ""
