"""The parser of `maml fit | validate | test`."""

import difflib
import re
import traceback
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.cli.checks.blame import refusal
from maml_pipeline.cli.checks.memory import bounded_memory
from maml_pipeline.cli.config_files import check_config_files
from maml_pipeline.cli.parser import Parser
from maml_pipeline.cli.parser_messages import one_line
from maml_pipeline.errors import UserError


class TrainingParser(Parser, LightningArgumentParser):
    """Lightning's parser, with errors of one line, also where a class cannot be built."""

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse arguments whose configuration files can be read."""
        check_config_files(args or [])
        parsed: Namespace = _serializable(super().parse_args(args, **kwargs))
        return parsed

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
            with bounded_memory(), warnings.catch_warnings():
                # An error follows, which says more.
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                built: Namespace = super().instantiate_classes(cfg, **kwargs)
                return built
        except UserError:
            raise
        except Exception as error:
            raise UserError(_why_not_built(cfg, error)) from error


def _serializable(value: Any) -> Any:
    """Write as text what YAML cannot hold: Timer's interval, an enumeration, and devices of PyTorch."""
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _serializable(item))
    elif isinstance(value, list):
        return [_serializable(item) for item in value]
    if isinstance(value, torch.device):
        return str(value)
    return value.value if isinstance(value, str) and isinstance(value, Enum) else value


def _why_not_built(cfg: Namespace, error: Exception) -> str:
    """Name the key of the class whose construction failed."""
    failed = {
        type(frame.f_locals["self"]).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if "self" in frame.f_locals
    }
    for key, value in cfg.items():
        if key.endswith("class_path") and str(value).rpartition(".")[2] in failed:
            key = key.removesuffix(".class_path")
            # The command stands before it.
            return refusal(key.partition(".")[2], cfg[key], error, lambda cls, **args: cls(**args))
    return one_line(str(error)) or type(error).__name__
