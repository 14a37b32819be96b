"""Configuration files, read once before the parser reads them, for errors that name file and line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.errors import UserError


def check_config_files(arguments: Sequence[str]) -> None:
    """Refuse configuration files that hold no keys, or one of them twice.

    Args:
        arguments: Those of a command, with any number of `--config FILE` among them.

    Raises:
        UserError: A file cannot be read, is no YAML, or is not a mapping of keys to values.
    """
    for name in config_files(arguments):
        if name.lstrip().startswith("{"):
            continue  # the configuration itself
        if not name.strip():
            raise UserError("config is empty; give the path of a YAML file")
        read_config(Path(name), "config")


def read_config(path: Path, key: str) -> dict[str, Any]:
    """Read a configuration file as it is, without defaults.

    Args:
        path: Of the file.
        key: What a person named it by, for the message.

    Raises:
        UserError: It cannot be read, is no YAML, or is not a mapping of keys to values.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{key} {path} is not a file; give a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"{key} {path} cannot be read: {error.strerror}; give a YAML file") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise UserError(f"{key} {path} is not a YAML file: it is not text") from error
    except yaml.YAMLError as error:
        raise UserError(f"{key} {path} is not YAML: {_problem(error)}") from error
    except RecursionError as error:
        raise UserError(f"{key} {path} is nested too deeply") from error
    if not isinstance(values, dict) or not values:
        kind = "empty" if not values else f"a {type(values).__name__}"
        raise UserError(f"{key} {path} is {kind}; it must hold keys with values, such as model:")
    return values


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the value of each `--config` among the arguments of a command."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            if equals:
                yield value
            elif following is not None:
                yield following


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's loader takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping whose keys differ, before `<<` puts those of another one into it."""
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} is there twice", key.start_mark
                )
            keys.add(name)
        return node
