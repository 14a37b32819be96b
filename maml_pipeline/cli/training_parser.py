"""The parser of `maml fit | validate | test`."""

import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from enum import Enum
from functools import cache
from typing import Any

import torch
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.cli.checks.address_space import bounded_memory
from maml_pipeline.cli.checks.blame import refusal
from maml_pipeline.cli.config_files import check_config_files
from maml_pipeline.cli.jsonargparse_internals import has_subcommands, parser_keys
from maml_pipeline.cli.parser import Parser
from maml_pipeline.cli.parser_messages import one_line
from maml_pipeline.cli.suggestions import describe_missing, suggest
from maml_pipeline.config_file import REMOVED_KEYS, RENAMED_KEYS, drop_removed_keys, rename_keys
from maml_pipeline.errors import UserError
from maml_pipeline.rank import is_rank_zero

MAX_LISTED_CLASSES = 20


def _load(text: str) -> Any:
    """Load YAML as jsonargparse does, and translate the keys of a config that earlier versions had."""
    value = get_loader("yaml")(text)
    for key in drop_removed_keys(value):
        tell_once(f"{key} is {REMOVED_KEYS[key]} and is ignored")
    for key in rename_keys(value):
        tell_once(f"{key} is {RENAMED_KEYS[key][0]} now")
    return value


@cache
def tell_once(notice: str) -> None:
    """Print a notice on stderr, once per process."""
    if is_rank_zero():
        print(notice, file=sys.stderr)


PARSER_MODE = "yaml with keys of earlier versions"
set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))


class TrainingParser(Parser, LightningArgumentParser):
    """Lightning's parser, with one-line errors that suggest a key for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "formatter_class": DefaultHelpFormatter,
            "parser_mode": PARSER_MODE,
        }
        super().__init__(**defaults | kwargs)

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse arguments and configuration files.

        Raises:
            UserError: A file cannot be read, or a key or a value is invalid.
        """
        check_config_files(args or [])
        try:
            parsed = super().parse_args(args, **kwargs)
        except UserError as error:
            if not has_subcommands(self):
                raise  # to the outermost parser, which has all arguments
            message = describe_missing(str(error), args or [])
            message += suggest(message, parser_keys(self), args or [])
            raise UserError(message) from error
        values: Namespace = _serializable(parsed)
        return values

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help without lists of hundreds of classes, such as every `nn.Module`."""
        text = super().format_help(*args, **kwargs)
        return re.sub(r",\s+known\s+subclasses:[^)]*", _shortened_classes, text)

    def instantiate_classes(self, cfg: Namespace, **kwargs: Any) -> Namespace:
        """Build the classes that the configuration names.

        Raises:
            UserError: One cannot be built.
        """
        try:
            with bounded_memory(), warnings.catch_warnings():
                # The error that follows says more.
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                built: Namespace = super().instantiate_classes(cfg, **kwargs)
                return built
        except UserError as error:
            raise UserError(_with_key(cfg, error)) from error
        except Exception as error:
            raise UserError(_construction_error(cfg, error)) from error


def _shortened_classes(found: re.Match[str]) -> str:
    return found[0] if found[0].count(",") <= MAX_LISTED_CLASSES else ""


def _serializable(value: Any) -> Any:
    """Convert what YAML cannot represent to text: Timer's interval, enumerations and PyTorch devices."""
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _serializable(item))
    elif isinstance(value, list):
        return [_serializable(item) for item in value]
    if isinstance(value, torch.device):
        return str(value)
    return value.value if isinstance(value, str) and isinstance(value, Enum) else value


def _with_key(cfg: Namespace, error: UserError) -> str:
    """Return the message of a class about one of its arguments, with the argument's key in full."""
    argument, _, rest = str(error).partition(" ")
    failed = _classes_at_work(error)
    keys: list[str] = list(cfg.keys())
    for key in keys:
        parent, _, name = key.rpartition(".")
        whole = parent.removesuffix(".init_args")
        spec = cfg.get(whole)
        path = spec.get("class_path") if isinstance(spec, Namespace) else None
        is_at_work = path is None or str(path).rpartition(".")[2] in failed
        group = re.search(r"(?:^|\.)((?:model|data)(?:\..*)?)$", whole)  # without the command
        if name == argument and is_at_work and group:
            return f"{group[1]}.{argument} {rest}"
    return str(error)


def _classes_at_work(error: Exception) -> set[str]:
    """Return the names of the classes whose methods raised an error or passed it on."""
    return {
        type(frame.f_locals["self"]).__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if "self" in frame.f_locals
    }


def _construction_error(cfg: Namespace, error: Exception) -> str:
    """Return a message that names the key of the class whose construction failed."""
    failed = _classes_at_work(error)
    for key, value in cfg.items():
        if key.endswith("class_path") and str(value).rpartition(".")[2] in failed:
            key = key.removesuffix(".class_path")
            key_in_command = key.partition(".")[2]
            return refusal(key_in_command, cfg[key], error, lambda cls, **args: cls(**args))
    return one_line(str(error)) or type(error).__name__
