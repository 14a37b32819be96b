"""Whether two configs describe the same run: which settings may change on resume or evaluation."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAY_CHANGE_ON_RESUME = {
    "ckpt_path": "where a run starts from",
    "run.dir": "where the run is saved",
    "run.experiment": "the run's name",
    "run.artifacts": "what is uploaded",
    "run.varied": "how a report groups the run",
    "run.checkpoint_every": "how many meta-steps a kill may cost",
    "trainer.max_steps": "how long to train",
    "trainer.max_time": "how long to train",
    "trainer.max_epochs": "how long to train",
    "trainer.accelerator": "where to compute",
    "trainer.devices": "where to compute: tasks and meta-batches do not depend on the number of devices",
    "trainer.num_nodes": "where to compute",
    "trainer.strategy": "where to compute",
    "trainer.callbacks": "what observes the training; callbacks that would change it are refused",
    "trainer.logger": "what is logged",
    "trainer.log_every_n_steps": "what is logged",
    "trainer.profiler": "what is logged",
    "trainer.detect_anomaly": "what is logged",
    "trainer.enable_progress_bar": "what is shown",
    "trainer.enable_model_summary": "what is shown",
    "trainer.default_root_dir": "not used: all files are in the run's folder",
    "probes": "what is measured during training",
    "model.tasks_per_chunk": "how fast to compute",
    "data.num_workers": "how fast to draw tasks",
    "data.tasks.init_args.root": "where the data are",
    "data.tasks.init_args.cache_dir": "where the data are",
    **{
        f"data.tasks.init_args.{key}.init_args.download": "whether missing data are downloaded"
        for key in ("dataset", "train_dataset", "val_dataset", "test_dataset")
    },
}
"""Keys that may change when a run is resumed, each with what it affects."""

MAY_CHANGE_ON_EVALUATION = {
    "data.test_tasks": "the number of test tasks",
    "data.val_tasks": "the number of validation tasks",
    "model.eval_inner_steps": "the number of inner steps of an evaluation",
    "model.transductive": "how an evaluation predicts a query set",
    "trainer.limit_test_batches": "the number of test tasks",
    "trainer.limit_val_batches": "the number of validation tasks",
    "trainer.precision": "the floating-point precision",
}
"""Keys that may change when a trained run is evaluated, each with what it affects."""


class Difference(NamedTuple):
    """A key whose value here differs from that in a run's folder."""

    key: str
    here: Any
    there: Any


def config_differences(
    here: Mapping[str, Any], there: Mapping[str, Any], ignored: Collection[str] = MAY_CHANGE_ON_RESUME
) -> list[Difference]:
    """Return the keys in which two resolved configs differ.

    Args:
        here: One config.
        there: The other config.
        ignored: Keys to ignore, including all keys below them.
    """
    return [found for found in _differences(here, there) if not is_listed(found.key, ignored)]


def is_listed(key: str, keys: Collection[str]) -> bool:
    """Tell whether a key, or a key above it, is in a list."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def describe_differences(folder: Path, found: Sequence[Difference]) -> str:
    """Describe the differences from a run's folder in one sentence."""
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
