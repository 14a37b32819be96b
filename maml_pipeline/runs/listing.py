"""Runs as a list: a run with its state, and its values by field or by key of the config."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from maml_pipeline.runs.run import Run, finite
from maml_pipeline.runs.state import RunState, Situation, situation
from maml_pipeline.slurm.queue import Job

MISSING = object()
"""The value of a key that a config does not have."""


@dataclass(frozen=True)
class ListedRun:
    """A run with its state.

    Args:
        run: The run.
        situation: Its state when it was read, and the reason.
    """

    run: Run
    situation: Situation

    @classmethod
    def of(cls, run: Run, job: Job | None = None) -> "ListedRun":
        """Read the state of a run.

        Args:
            run: The run.
            job: Its Slurm job, if Slurm knows it.
        """
        return cls(run, situation(run, job))

    @property
    def state(self) -> RunState | None:
        """Its state; `None` if unknown."""
        return self.situation.state

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of the run by name, as plain values; `None` for an unknown one."""
        run, result = self.run, self.run.result
        inner_lr = config_value(run.config, "model.inner_lr")
        return {
            "experiment": run.experiment,
            "order": str(run.order),
            "inner_steps": run.inner_steps,
            "seed": run.seed,
            "inner_lr": inner_lr if is_number(inner_lr) else None,
            "meta_steps": run.meta_steps,
            "max_steps": run.max_steps if run.max_steps >= 0 else None,
            "state": None if self.state is None else str(self.state),
            "job": self.situation.job,
            "reason": self.situation.reason or None,
            "measure": run.measure,
            "split": None if result is None else {"val": "validation"}.get(result.split, result.split),
            "result": None if result is None else finite(result.mean),
            "ci95": None if result is None else finite(result.ci95),
            "folder": str(run.source),
        }

    def value(self, key: str) -> Any:
        """Return the value of a field or of a key of the config; `MISSING` if there is none."""
        name = ALIASES.get(key, key)
        return self.fields[name] if name in FIELDS else config_value(self.run.config, key)


FIELDS = (
    *("experiment", "order", "inner_steps", "seed", "inner_lr", "meta_steps", "max_steps"),
    *("state", "job", "reason", "measure", "split", "result", "ci95", "folder"),
)
"""The names of all fields, for `--sort`, `--filter` and `--json`."""

ALIASES = {"k": "inner_steps", "alpha": "inner_lr"}
"""Names of fields in the headings of the table."""


def config_value(config: Any, key: str) -> Any:
    """Return the value of a key of a resolved config, as it is named on the command line.

    Args:
        config: The config.
        key: Such as `model.inner_lr`; `data.tasks.shots` is `data.tasks.init_args.shots`, and
            `model.network` the class path of the network.

    Returns:
        The value; `MISSING` if there is no such key.
    """
    value = config
    for name in key.split("."):
        if isinstance(value, dict) and name not in value:
            value = value.get("init_args")
        if not isinstance(value, dict) or name not in value:
            return MISSING
        value = value[name]
    return value["class_path"] if isinstance(value, dict) and "class_path" in value else value


def is_number(value: Any) -> bool:
    """Tell whether a value is a number; a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
