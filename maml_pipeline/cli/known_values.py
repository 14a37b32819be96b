"""Refuse a number, a switch or a choice that is invalid before PyTorch and Lightning are imported.

Types are read from the source code, as keys are (known_keys.py), and ranges are those of ranges.py. A
value of any other type, and a range that only the class itself knows, wait for the parser.
"""

import ast
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Optional, Union

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from maml_pipeline.cli.config_files import CONFIG_FLAGS, find_shipped
from maml_pipeline.cli.known_keys import GROUPS, arguments_of, is_left_to_the_parser
from maml_pipeline.cli.parser import Parser
from maml_pipeline.cli.ranges import check_range
from maml_pipeline.config_file import read_config

NAMES = {
    **{"int": int, "float": float, "bool": bool, "Literal": Literal, "Optional": Optional},
    **{"Union": Union, "PositiveInt": PositiveInt, "NonNegativeInt": NonNegativeInt},
}
"""The names that the annotation of a plain type consists of."""


class ValueParser(Parser, ArgumentParser):
    """Parses single keys, with the messages of the parser of a training."""


def check_values(arguments: Sequence[str]) -> None:
    """Check the plain values of a training's arguments and configuration files.

    Args:
        arguments: The arguments after the command; their keys exist, and their files can be read.

    Raises:
        UserError: A value has the wrong type, or is out of range.
    """
    if is_left_to_the_parser(arguments):
        return
    types = plain_types()
    given = _last_values(find_shipped(arguments))
    for key in (key for key in given if key in types):
        parser = ValueParser()
        parser.add_argument(f"--{key}", type=types[key])
        value = given[key]
        is_text = isinstance(value, str)
        parsed = (
            parser.parse_args([f"--{key}={value}"]) if is_text else parser.parse_object({key: value})
        )
        check_range(key, parsed[key])


@cache
def plain_types() -> dict[str, Any]:
    """Return the types of the keys that take a number, a switch or a choice."""
    return {
        f"{group}.{name}": eval(ast.unparse(annotation), dict(NAMES))
        for group, source in GROUPS.items()
        for name, annotation in arguments_of(*source).items()
        if annotation is not None and _is_plain(annotation)
    }


def _is_plain(annotation: ast.expr) -> bool:
    return all(node.id in NAMES for node in ast.walk(annotation) if isinstance(node, ast.Name))


def _last_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the keys of two parts in flags and configuration files, each with its last value.

    A flag may give a whole group, as JSON or by the name of a file. Its values, and those that it
    replaces, are left to the parser.
    """
    given: dict[str, Any] = {}
    for argument, following in pairwise([*arguments, None]):
        assert argument is not None
        flag, equals, text = argument.partition("=")
        value = text if equals else following
        if not flag.startswith("-") or value is None or (not equals and value.startswith("--")):
            continue
        key = flag.removeprefix("--")
        if flag in CONFIG_FLAGS and not value.lstrip().startswith("{"):
            for group, values in read_config(Path(value), "config").items():
                if isinstance(values, dict):
                    given |= {f"{group}.{name}": found for name, found in values.items()}
        elif flag in CONFIG_FLAGS:
            given.clear()
        elif key in GROUPS:
            given = {name: found for name, found in given.items() if not name.startswith(f"{key}.")}
        else:
            given[key] = value
    return given
