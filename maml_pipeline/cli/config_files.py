"""Find and check the configuration files of a command; the parser reads them afterwards."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maml_pipeline.config_file import read_config
from maml_pipeline.errors import UserError
from maml_pipeline.shipped_files import shipped_configs

CONFIG_FLAGS = ("--config", "-c")


def find_shipped(arguments: Sequence[str]) -> list[str]:
    """Replace each `--config NAME` that names a shipped config by the path of its file.

    A file of that name in the working directory has precedence.

    Args:
        arguments: The arguments of a command.

    Raises:
        UserError: There is neither such a file nor such a config.
    """
    found: list[str] = []
    before = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if before in CONFIG_FLAGS:
            found.append(_file_of(argument))
        elif flag in CONFIG_FLAGS and equals:
            found.append(f"{flag}={_file_of(value)}")
        else:
            found.append(argument)
        before = argument
    return found


def _file_of(value: str) -> str:
    """Return the path of a config that is named on the command line; other values unchanged."""
    shipped = shipped_configs()
    if value in shipped and not Path(value).is_file():
        return str(shipped[value])
    has_suffix = Path(value).suffix in (".yaml", ".yml")
    is_name = value.strip() and not has_suffix and not value.lstrip().startswith("{")
    if is_name and not Path(value).exists():
        close = difflib.get_close_matches(value, shipped, n=1)
        remedy = f"did you mean {close[0]}?" if close else "`maml configs` lists those of the package"
        raise UserError(f"config {value} is neither a file nor a config of the package; {remedy}")
    return value


def check_config_files(arguments: Sequence[str]) -> None:
    """Check that the configuration files of a command can be read and set what they say.

    Args:
        arguments: The arguments of a command, with any number of `--config FILE`.

    Raises:
        UserError: A file cannot be read, is not YAML or not a mapping, or has duplicate keys or a
            seed that would be replaced.
    """
    for name in config_files(arguments):
        if name.lstrip().startswith("{"):
            continue  # the configuration itself, as JSON
        if not name.strip():
            raise UserError("config is empty; give the path of a YAML file")
        _check_seed(name, read_config(Path(name), "config"))


def _check_seed(name: str, values: dict[str, Any]) -> None:
    """Refuse a seed of the data that would be replaced; an equal one may stand in an earlier config."""
    data = values.get("data")
    if isinstance(data, dict) and "seed" in data and data["seed"] != values.get("seed_everything"):
        raise UserError(
            f"data.seed is {data['seed']} in {name}; it is set by seed_everything: set that instead"
        )


def config_files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the value of each `--config` among the arguments of a command."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        name, equals, value = argument.partition("=")
        if name in CONFIG_FLAGS:
            if equals:
                yield value
            elif following is not None:
                yield following
