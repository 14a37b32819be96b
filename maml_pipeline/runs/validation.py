"""Validating everything that a report uses of a run, whose files may be damaged or foreign."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maml_pipeline.config_file import drop_removed_keys, rename_keys
from maml_pipeline.gradient_order import Method
from maml_pipeline.metrics_table import MetricsRow
from maml_pipeline.runs.run import Run
from maml_pipeline.text import shortened

MAX_CONFIG_VALUES, MAX_CONFIG_DEPTH = 20_000, 40
"""Limits far above any config; YAML with references to itself would have no end."""

MAX_META_STEPS = 10**12
MAX_INNER_STEPS = 10**6


class UnreadableRunError(ValueError):
    """A run cannot be reported; the message gives the reason in one line, without the run's folder."""


def build_run(source: Path, config: Any, history: list[Any], test: Any) -> Run:
    """Build a run after validating everything that a report uses.

    Args:
        source: The folder or file that the run was read from.
        config: The resolved config, from YAML or JSON; keys of earlier versions are translated.
        history: The logged rows, by meta-step.
        test: The test result; empty before the test.

    Raises:
        UnreadableRunError: A value is missing or invalid.
    """
    drop_removed_keys(config)
    rename_keys(config)
    _check_config(config)
    if not isinstance(test, dict):
        raise UnreadableRunError("the test result has no metrics")
    results = {k: _number(k, v) for k, v in test.items() if str(k).startswith("test/")}
    return Run(source, config, [_checked_record(record) for record in history], results)


def _check_config(config: Any) -> None:
    if not config:
        raise UnreadableRunError("the config is empty")
    _check_size(config)

    def get(key: str) -> Any:
        value = config
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                raise UnreadableRunError(f"it is not a run of this program: its config has no {key}")
            value = value[name]
        return value

    for key, (wanted, accepts) in CONFIG_KEYS.items():
        if not accepts(value := get(key)):
            raise UnreadableRunError(f"its config has {key} {shortened(repr(value), 40)}, not {wanted}")
    steps = get("model").get("differentiated_steps")  # older versions lack it
    if not (steps is None or _is_whole(steps, 0, MAX_INNER_STEPS)):
        raise UnreadableRunError(
            f"its config has model.differentiated_steps {shortened(repr(steps), 40)}, not a number"
        )
    varied = get("run").get("varied")
    if not (varied is None or (isinstance(varied, list) and all(isinstance(k, str) for k in varied))):
        raise UnreadableRunError(f"its config has run.varied {shortened(repr(varied), 40)}, not keys")
    if get("run.experiment") is None:
        get("data.tasks.class_path")  # which then gives the name


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


CONFIG_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "run.experiment": ("a name", lambda value: value is None or isinstance(value, str)),
    "run.monitor": ("a metric val/...", lambda v: isinstance(v, str) and v[:4] == "val/" != v),
    "run.mode": ("min or max", lambda value: value in ("min", "max")),
    "seed_everything": ("a seed", lambda value: _is_whole(value, 0, 2**64)),
    "model.first_order": ("true or false", lambda value: isinstance(value, bool)),
    "model.method": (f"one of {', '.join(Method)}", lambda value: value in [*Method]),
    "model.inner_steps": ("a number of steps", lambda value: _is_whole(value, 0, MAX_INNER_STEPS)),
    "trainer.max_steps": ("a number of meta-steps", lambda value: _is_whole(value, -1, MAX_META_STEPS)),
    "data": ("settings", lambda value: isinstance(value, dict)),
}
"""The keys that a report uses, each with its valid values and their check."""


def _check_size(config: Any) -> None:
    """Refuse YAML that refers to itself or expands to a huge number of values."""
    values, waiting = 0, [(config, 0)]
    while waiting:
        value, level = waiting.pop()
        values += 1
        if values > MAX_CONFIG_VALUES or level > MAX_CONFIG_DEPTH:
            raise UnreadableRunError("the config is too large or too deeply nested to be that of a run")
        if isinstance(value, dict):
            waiting += [(inner, level + 1) for inner in value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += [(inner, level + 1) for inner in value]


def _checked_record(record: Any) -> MetricsRow:
    if not isinstance(record, dict):
        raise UnreadableRunError(f"a row of metrics is {shortened(repr(record), 40)}")
    numbers = {str(key): _number(key, value) for key, value in record.items()}
    step = numbers.get("step", math.nan)
    if not (-1 <= step <= MAX_META_STEPS and step == int(step)):
        raise UnreadableRunError(f"metrics are logged at meta-step {record.get('step')}")
    return numbers


def _number(key: object, value: Any) -> float:
    """Return a number; `null` in JSON stands for one that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnreadableRunError(
            f"{shortened(key, 40)} is {shortened(repr(value), 40)}, which is not a number"
        )
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
