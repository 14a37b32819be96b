"""Which run a folder holds: the settings that make a run, and what may differ between its parts."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAY_CHANGE_ON_RESUME = {
    "ckpt_path": "how a run was started",
    "run.dir": "where it lies",
    "run.experiment": "what it is called",
    "run.artifacts": "what is uploaded",
    "run.checkpoint_every": "how much a kill may cost",
    "trainer.max_steps": "how long to train",
    "trainer.max_time": "how long to train",
    "trainer.max_epochs": "how long to train",
    "trainer.accelerator": "where to compute",
    "trainer.devices": "where to compute: tasks and meta-batch are the same on any number of devices",
    "trainer.num_nodes": "where to compute",
    "trainer.strategy": "where to compute",
    "trainer.callbacks": "what observes the training; those that would change it are refused",
    "trainer.logger": "what is logged",
    "trainer.log_every_n_steps": "what is logged",
    "trainer.profiler": "what is logged",
    "trainer.detect_anomaly": "what is logged",
    "trainer.enable_progress_bar": "what is shown",
    "trainer.enable_model_summary": "what is shown",
    "trainer.default_root_dir": "not used: everything is in the run's folder",
    "probes": "what is measured beside the training",
    "model.compile": "how fast to compute",
    "model.tasks_per_chunk": "how fast to compute",
    "data.num_workers": "how fast to draw tasks",
    "data.tasks.init_args.root": "where the data lie",
    "data.tasks.init_args.cache_dir": "where the data lie",
}
"""Keys in which two parts of one run may differ, each with the reason."""

MAY_CHANGE_ON_EVALUATION = {
    "data.test_tasks": "how many tasks a test takes",
    "data.val_tasks": "how many tasks a validation takes",
    "model.eval_inner_steps": "how far a measurement adapts",
    "model.transductive": "how a measurement predicts a query set",
    "trainer.limit_test_batches": "how many tasks a test takes",
    "trainer.limit_val_batches": "how many tasks a validation takes",
    "trainer.precision": "how exactly to compute",
}
"""Keys in which a measurement of a trained run may differ from its training, each with the reason."""


class Difference(NamedTuple):
    """A key that has another value in a run's folder than here."""

    key: str
    here: Any
    there: Any


def config_differences(
    here: Mapping[str, Any], there: Mapping[str, Any], ignored: Collection[str] = MAY_CHANGE_ON_RESUME
) -> list[Difference]:
    """Return the keys in which two resolved configs differ.

    Args:
        here: The one.
        there: The other.
        ignored: Keys that do not count, with all below them.
    """
    return [found for found in _differences(here, there) if not is_listed(found.key, ignored)]


def is_listed(key: str, keys: Collection[str]) -> bool:
    """Tell whether a key, or one above it, is among some keys."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def describe_differences(folder: Path, found: Sequence[Difference]) -> str:
    """Put differences to a run's folder into one sentence."""
    shown = [f"{key} is {here} here and {there} there" for key, here, there in found[:3]]
    more = [f"{len(found) - 3} more"] if len(found) > 3 else []
    return f"{folder} holds another run: " + ", ".join([*shown, *more])


def _differences(here: Any, there: Any, key: str = "") -> list[Difference]:
    if not (isinstance(here, Mapping) and isinstance(there, Mapping)):
        return [] if here == there else [Difference(key, here, there)]
    return [
        difference
        for name in {**here, **there}
        for difference in _differences(
            here.get(name), there.get(name), f"{key}.{name}" if key else str(name)
        )
    ]
