"""The parsers of all commands: argparse's, jsonargparse's and Lightning's, with errors of one line."""

import argparse
import difflib
import re
import traceback
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.errors import UserError

LONGEST = 300


class OneLineErrors:
    """Makes a parser's errors a line each, without the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong as a `UserError`."""
        raise UserError(shortened(message) + self.suggestion(message))

    def suggestion(self, message: str) -> str:
        """Name what may have been meant, to follow the message."""
        return ""


class FlagParser(OneLineErrors, argparse.ArgumentParser):  # type: ignore[misc]
    """The parser of a command with flags of its own."""


class TypedFlagParser(OneLineErrors, jsonargparse.ArgumentParser):  # type: ignore[misc]
    """The same with typed flags."""


class MamlParser(OneLineErrors, LightningArgumentParser):  # type: ignore[misc]
    """The parser of `maml fit | validate | test`: Lightning's."""

    def suggestion(self, message: str) -> str:
        """Name the keys that come closest to one that does not exist."""
        unknown = re.search(
            r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'|Key '([\w.]+)' is not expected",
            message,
        )
        if unknown is None:
            return ""
        key = unknown[1] or unknown[2] or unknown[3]
        parsers = [self]
        if self._subcommands_action is not None:
            parsers += self._subcommands_action._name_parser_map.values()
        keys = [action.dest for parser in parsers for action in parser._actions]
        close = difflib.get_close_matches(key, keys, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else ""

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """Build the classes that the configuration names.

        Raises:
            UserError: One cannot be built.
        """
        try:
            return super().instantiate_classes(cfg, **kwargs)
        except UserError:
            raise
        except Exception as error:
            raise UserError(_why_not_built(cfg, error)) from error


def shortened(message: str) -> str:
    """Return a parser's message as one line: the key, the value and what would be right."""
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def _why_not_built(cfg: Namespace, error: Exception) -> str:
    """Name the key of the class whose construction failed."""
    failed = {
        type(frame.f_locals["self"]).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if "self" in frame.f_locals
    }
    reason = shortened(str(error))[:LONGEST] or type(error).__name__
    for key, value in cfg.items():
        if key.endswith("class_path") and str(value).rpartition(".")[2] in failed:
            key = key.removesuffix(".class_path").partition(".")[2]
            return f"{key}: {value} cannot be built: {type(error).__name__}: {reason}"
    return f"{type(error).__name__}: {reason}"
