"""Read a file of settings, with errors that name file and line; translate keys of earlier versions."""

from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.errors import UserError

REMOVED_KEYS = {"model.compile": "no longer needed"}
"""Keys of earlier versions, which files may still have, each with the reason why it was removed."""


RENAMED_KEYS: dict[str, tuple[str, dict[bool, str]]] = {
    "model.first_order_steps": ("model.first_order_meta_steps", {}),
    "model.checkpoint_inner_steps": ("model.method", {True: "checkpointed", False: "unrolled"}),
}
"""Keys of earlier versions, each with its present name and the present names of its values."""


def drop_removed_keys(config: Any) -> list[str]:
    """Remove the keys in `REMOVED_KEYS` from a configuration.

    Args:
        config: Any value; a mapping is changed in place.

    Returns:
        The removed keys that asked for something: those whose value is not false or empty.
    """
    asked = []
    for key in REMOVED_KEYS:
        holder, name = _holder(config, key)
        if holder.pop(name, None):
            asked.append(key)
    return asked


def rename_keys(config: Any) -> list[str]:
    """Give the keys in `RENAMED_KEYS` of a configuration their present names, also in `run.varied`.

    Args:
        config: Any value; a mapping is changed in place. A key with its present name has precedence.

    Returns:
        The earlier names of the keys that were renamed.
    """
    renamed = []
    for key, (present, values) in RENAMED_KEYS.items():
        holder, name = _holder(config, key)
        if name in holder:
            renamed.append(key)
            value = holder.pop(name)
            value = values.get(value, value) if isinstance(value, bool) else value
            holder.setdefault(present.rpartition(".")[2], value)
    model, _ = _holder(config, "model.first_order")
    if "model.checkpoint_inner_steps" in renamed and model.get("first_order") is True:
        model["method"] = "unrolled"  # first order ignored that key
    run, _ = _holder(config, "run.varied")
    if isinstance(varied := run.get("varied"), list):
        run["varied"] = [RENAMED_KEYS[k][0] if k in [*RENAMED_KEYS] else k for k in varied]
    return renamed


def _holder(config: Any, key: str) -> tuple[dict[Any, Any], str]:
    """Return the mapping that holds a key, or an empty one, and the key's last name."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config.get(parent) if isinstance(config, dict) else None
    return (config if isinstance(config, dict) else {}), name


def read_config(path: Path, key: str) -> dict[str, Any]:
    """Read a configuration file, without adding defaults; keys of earlier versions are translated.

    Args:
        path: Path of the file.
        key: What the error message calls it.

    Raises:
        UserError: It cannot be read, is not YAML, or is not a mapping.
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
    drop_removed_keys(values)
    rename_keys(values)
    return values


def _problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which PyYAML silently takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check the keys of a mapping, before `<<` merges those of another into it."""
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {name}", key.start_mark
                )
            keys.add(name)
        return node
