"""Settings that a trade-off varies beside order, inner steps and seed: their values and their names.

A run says in `run.varied` which keys those are. Keys are those of `config.yaml`, such as
`model.optimizer.init_args.lr`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from maml_pipeline.text import shortened

PLAIN_NAME = re.compile(r"[a-z0-9_.+-]{1,30}")
PLAIN_NUMBERS = re.compile(r"[0-9.e+-]{1,12}(,[0-9.e+-]{1,12}){1,4}")
"""Texts of values that name a folder as they are, also on a file system that ignores case."""


def varied_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each varied key of a resolved config, sorted by key."""
    keys = config["run"].get("varied") or ()
    return {key: config_value(config, key) for key in sorted(keys)}


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, a whole number as `int`; `None` if the config has no such key."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def set_config_value(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a key, also below one that is `null`, such as `model.learned_inner_lr.lr`."""
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(config.get(parent), dict):
            config[parent] = {}
        config = config[parent]
    config[name] = value


def has_key(config: Mapping[str, Any], key: str) -> bool:
    """Tell whether a config has a key."""
    value: Any = config
    for name in key.split("."):
        if not (isinstance(value, Mapping) and name in value):
            return False
        value = value[name]
    return True


def resolved_key(config: Mapping[str, Any], key: str) -> str:
    """Return a key as it is in a resolved config, with `init_args` before the arguments of a class."""
    names: list[str] = []
    value: Any = config
    for name in key.split("."):
        if isinstance(value, Mapping) and "class_path" in value and name not in value:
            names.append("init_args")
            value = value.get("init_args")
        names.append(name)
        value = value.get(name) if isinstance(value, Mapping) else None
    return ".".join(names)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest end of each key that no other key has: `inner_lr` for `model.inner_lr`."""
    ends = {key: _ends(key) for key in keys}
    return {
        key: next((end for end in own if sum(end in other for other in ends.values()) == 1), key)
        for key, own in ends.items()
    }


def _ends(key: str) -> list[str]:
    """Return the ends of a key, the shortest first."""
    names = [name for name in key.split(".") if name != "init_args"]
    if names[-2:] == ["learned_inner_lr", "lr"]:  # `lr` alone is read as the optimizer's
        names[-2:] = [".".join(names[-2:])]
    return [".".join(names[first:]) for first in reversed(range(len(names)))]


def value_text(value: Any) -> str:
    """Return a value as text to read: `0.1`, `null`, `0.* 2.*` for a list of words, `lr 0.001`."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return shortened(" ".join(value), 40)
    if isinstance(value, Mapping) and value and "class_path" not in value:
        return shortened(", ".join(f"{key} {value_text(one)}" for key, one in value.items()), 40)
    return _name_text(value)


def _name_text(value: Any) -> str:
    """Return a value as text that names a folder: a class as its name and a digest."""
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{shortened(name, 40)}-{_digest(value)}"
    return shortened(value if isinstance(value, str) else _json(value), 40)


def setting_text(setting: Mapping[str, Any]) -> str:
    """Return the values of varied keys in words, such as `inner_lr 0.4, meta_batch_size 8`."""
    names = short_names(setting)
    return ", ".join(f"{names[key]} {value_text(value)}" for key, value in setting.items())


def folder_suffix(setting: Mapping[str, Any]) -> str:
    """Return the part of a folder's name for the values of varied keys, such as `-inner_lr=0.4`.

    Different values have different names. A name depends on nothing but the keys and the value.
    """
    names = short_names(setting)
    return "".join(f"-{names[key]}={_folder_name(value)}" for key, value in setting.items())


def identity(setting: Mapping[str, Any]) -> str:
    """Return a text that is the same for equal values, to group by."""
    return _json(setting)


def sort_key(setting: Mapping[str, Any]) -> list[tuple[bool, float, str]]:
    """Return a key that sorts by the values: numbers by size, before other values by their text."""
    return [
        (False, value, "") if _is_number(value) else (True, 0, _json(value))
        for value in setting.values()
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _folder_name(value: Any) -> str:
    if isinstance(value, list) and all(map(_is_number, value)):
        numbers = ",".join(map(str, value))
        if PLAIN_NUMBERS.fullmatch(numbers):
            return numbers
    text = _name_text(value)
    if PLAIN_NAME.fullmatch(text):
        return text
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)
    is_class = isinstance(value, Mapping) and "class_path" in value  # whose text ends with the digest
    return plain if is_class else f"{plain[:30].strip('_')}-{_digest(value)}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # YAML also has dates


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()[:8]
