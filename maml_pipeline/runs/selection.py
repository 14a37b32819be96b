"""Selecting listed runs: filtering and sorting them by their fields or by keys of their config."""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.runs.listing import ALIASES, FIELDS, MISSING, ListedRun, is_number
from maml_pipeline.runs.state import RunState
from maml_pipeline.text import shortened

EXAMPLE_KEY = "model.engine"


@dataclass(frozen=True)
class Filter:
    """A condition on a field, or on a key of the config.

    Args:
        key: Name of the field or key.
        wanted: The value: a number, `true`, `false`, `null`, a list, or text with the wildcards of a
            shell.
    """

    key: str
    wanted: str

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Parse `KEY=VALUE`.

        Raises:
            ValueError: It has another form.
        """
        key, equals, wanted = text.partition("=")
        if not equals or not key.strip() or not wanted.strip():
            raise ValueError(text)
        return cls(key.strip(), wanted.strip())

    def accepts(self, listed: ListedRun) -> bool:
        """Tell whether a run satisfies the condition."""
        value, wanted = listed.value(self.key), self.wanted
        if value is MISSING:
            return False
        if value is None or isinstance(value, bool):
            return wanted == json.dumps(value)
        if is_number(value):
            return bool(_number(wanted) == value)
        if isinstance(value, str):
            # A class can be named without its module.
            return any(fnmatchcase(text, wanted) for text in (value, value.rpartition(".")[2]))
        try:
            return bool(yaml.safe_load(wanted) == value)
        except yaml.YAMLError:
            return False


def filtered(runs: Sequence[ListedRun], filters: Sequence[Filter]) -> list[ListedRun]:
    """Return the runs that satisfy every filter, in their order.

    Raises:
        UserError: No run has the key of a filter.
    """
    for one in filters:
        check_key("--filter", one.key, runs)
    return [run for run in runs if all(one.accepts(run) for one in filters)]


def describe_no_match(runs: Sequence[ListedRun], filters: Sequence[Filter]) -> str:
    """Say which filter accepts no run and which values there are, or that no run satisfies all."""
    for one in filters:
        if not any(one.accepts(run) for run in runs):
            found = dict.fromkeys(_shown(run.value(one.key)) for run in runs)
            shown = shortened(", ".join(found), 200)
            return f"No run has {one.key}={one.wanted}; {one.key} is {shown}"
    return "No run satisfies all filters: " + ", ".join(f"{one.key}={one.wanted}" for one in filters)


def check_key(option: str, key: str, runs: Sequence[ListedRun]) -> None:
    """Check that a key is a field, or a key of a config.

    Args:
        option: The option that has the key, for the message.
        key: The key.
        runs: The runs; one of their configs must have the key.

    Raises:
        UserError: There is no such key.
    """
    if key in FIELDS or key in ALIASES:
        return
    if all(isinstance(run.value(key), dict) or run.value(key) is MISSING for run in runs):
        keys = dict.fromkeys(name for run in runs for name in _keys(run.run.config))
        close = _closest(key, [*FIELDS, *ALIASES, *keys])
        hint = f"did you mean {' or '.join(close)}?" if close else f"such as {EXAMPLE_KEY}"
        raise UserError(
            f"{option}: no run has the key {shortened(key, 60)}; it must be "
            f"{', '.join([*FIELDS, *ALIASES])}, or a key of config.yaml; {hint}"
        )


def _closest(key: str, keys: Sequence[str]) -> list[str]:
    """Return keys that end as a key does, or else those that are spelled alike."""
    last = key.rpartition(".")[2]
    same = [name for name in keys if name.rpartition(".")[2] == last]
    return (same or difflib.get_close_matches(key, keys, n=3))[:3]


def _keys(config: Any, key: str = "") -> list[str]:
    """Return all keys of a config that have a value, as they are named on the command line."""
    if not isinstance(config, dict):
        return [key]
    found = [key] if "class_path" in config else []
    for name, value in config.items():
        if name == "init_args":
            found += _keys(value, key)
        elif name != "class_path":
            found += _keys(value, f"{key}.{name}" if key else str(name))
    return found


def sorted_by(runs: Sequence[ListedRun], keys: Sequence[str], reverse: bool = False) -> list[ListedRun]:
    """Return the runs sorted by some keys; runs that are equal in all of them keep their order.

    Args:
        runs: In any order.
        keys: Names of fields or of keys of the config, the most important first; `result` sorts the
            best result first.
        reverse: Reverse the order. Runs without a value are last in any case.

    Raises:
        UserError: No run has one of the keys.
    """
    for key in keys:
        check_key("--sort", key, runs)
    found = [*runs]
    if reverse and not keys:
        return found[::-1]
    for key in reversed(keys):
        ranked = [(_rank(run, key), run) for run in found]
        known = [(rank, run) for rank, run in ranked if rank is not None]
        known.sort(key=lambda pair: pair[0], reverse=reverse)
        found = [run for _, run in known] + [run for rank, run in ranked if rank is None]
    return found


def _rank(listed: ListedRun, key: str) -> tuple[Any, ...] | None:
    """Return what a run is sorted by; `None` if it has no value."""
    value = listed.value(key)
    if value is MISSING or value is None:
        return None
    if key == "result":
        return (listed.run.measure, -value if listed.run.higher_is_better else value)
    if key == "order":
        return listed.run.order.rank
    if key == "state":
        return ([*RunState].index(RunState(value)),)
    return (0, value) if is_number(value) else (1, _shown(value))


def _shown(value: Any) -> str:
    if value is MISSING:
        return "missing"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
