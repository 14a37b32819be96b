"""The valid values of Lightning's keys, and upper bounds and paths of this project's, beyond their type.

Other ranges are checked by the class that takes the argument, in its constructor.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jsonargparse import Namespace

from maml_pipeline.errors import UserError
from maml_pipeline.limits import (
    MAX_ACCUMULATED_BATCHES,
    MAX_BATCHES,
    MAX_EVALUATION_TASKS,
    MAX_INNER_STEPS,
    MAX_WORKERS,
)


class Range(NamedTuple):
    """The valid values of a key.

    Args:
        key: Its name in the configuration.
        accepts: Returns whether a value is valid.
        remedy: What to do instead, to follow "KEY is VALUE; ".
    """

    key: str
    accepts: Callable[[Any], bool]
    remedy: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from(minimum: int, *others: Any) -> Callable[[Any], bool]:
    return lambda value: value in others or (_is_whole(value) and value >= minimum)


def _up_to(maximum: int) -> Callable[[Any], bool]:
    return lambda value: value is None or value <= maximum


def _is_off(value: Any) -> bool:
    return value is None or value is False or value == 0


def _is_named(value: Any) -> bool:
    return value is None or str(value).strip() not in ("", ".")


MOST_STEPS_TEXT = f"it must be at most {MAX_INNER_STEPS:,}: every inner step is a column of metrics.csv"
MOST_TASKS_TEXT = f"it must be at most {MAX_EVALUATION_TASKS:,}"

RANGES = (
    Range("model.inner_steps", _up_to(MAX_INNER_STEPS), MOST_STEPS_TEXT),
    Range("model.eval_inner_steps", _up_to(MAX_INNER_STEPS), MOST_STEPS_TEXT),
    Range("data.val_tasks", _up_to(MAX_EVALUATION_TASKS), MOST_TASKS_TEXT),
    Range("data.test_tasks", _up_to(MAX_EVALUATION_TASKS), MOST_TASKS_TEXT),
    Range("data.num_workers", _up_to(MAX_WORKERS), f"it must be at most {MAX_WORKERS}"),
    Range("ckpt_path", _is_named, "give best, last or a file's path"),
    Range("run.dir", _is_named, "name a folder, or leave the key out"),
    Range("trainer.num_nodes", _from(1), "it must be 1 or more"),
    Range("trainer.max_steps", _from(0, -1), "it must be 0 or more, or -1 for no end"),
    Range("trainer.max_epochs", _from(1, -1, None), "it must be 1 or more, or -1 for no end"),
    Range(
        "trainer.accumulate_grad_batches",
        lambda value: _is_whole(value) and 1 <= value <= MAX_ACCUMULATED_BATCHES,
        f"it must be from 1 to {MAX_ACCUMULATED_BATCHES:,}",
    ),
    Range(
        "trainer.limit_train_batches",
        lambda value: value is None or 0 < value <= MAX_BATCHES,
        "nothing would be trained, or no epoch would end; remove the key, or name a number of batches",
    ),
    Range("trainer.check_val_every_n_epoch", _from(1, None), "it must be 1 or more, or null"),
    Range(
        "trainer.limit_predict_batches", lambda value: value is None, "nothing is predicted; remove it"
    ),
    Range(
        "trainer.val_check_interval",
        _from(1),
        "it must be a whole number of meta-steps, 1 or more: the stream of tasks has no length, and "
        "devices would disagree on a time",
    ),
    Range("trainer.log_every_n_steps", _from(0, None), "it must be 1 or more, or 0 for never"),
    Range("trainer.num_sanity_val_steps", _from(-1, None), "it must be 0 or more, or -1 for all"),
    Range(
        "trainer.gradient_clip_val",
        lambda value: value is None or 0 <= value < math.inf,
        "it must be a number from 0",
    ),
    Range(
        "trainer.limit_test_batches",
        lambda value: value is None or value > 0,
        "nothing would be tested; set data.test_tasks to test fewer tasks",
    ),
    Range(
        "trainer.overfit_batches",
        _is_off,
        "an endless stream of tasks has no batches to repeat; remove the key, or write a "
        "TaskDistribution with few tasks",
    ),
    Range(
        "trainer.fast_dev_run",
        _is_off,
        "it keeps neither metrics nor checkpoints, which a run needs; try trainer.max_steps 5 instead",
    ),
    Range(
        "trainer.barebones", _is_off, "it forbids the metrics and checkpoints of a run; remove the key"
    ),
    Range(
        "trainer.enable_checkpointing",
        lambda value: value in (None, True),
        "a run is tested and resumed from its checkpoints; run.checkpoint_every says how often one is "
        "saved",
    ),
    Range(
        "trainer.min_steps", _is_off, "it has no effect here; trainer.max_steps says when training ends"
    ),
    Range(
        "trainer.min_epochs", _is_off, "it has no effect here; trainer.max_steps says when training ends"
    ),
    Range(
        "trainer.reload_dataloaders_every_n_epochs",
        _is_off,
        "tasks come from one endless stream; remove the key",
    ),
    Range(
        "trainer.default_root_dir",
        lambda value: value is None,
        "a run writes to its own folder; set run.dir",
    ),
    Range(
        "trainer.model_registry",
        lambda value: value is None,
        "models are kept in the run's folder and in W&B: see run.artifacts",
    ),
    Range(
        "trainer.logger",
        lambda value: value is not False,
        "a run always keeps metrics.csv; set WANDB_MODE=disabled to leave out W&B",
    ),
    Range(
        "trainer.strategy",
        lambda value: not str(value).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")),
        "a training cannot be sent to spawned or forked processes; use ddp",
    ),
)


def check_ranges(settings: Namespace) -> None:
    """Refuse values that have the right type but cannot work.

    Args:
        settings: The parsed configuration.

    Raises:
        UserError: A value is out of range.
    """
    for valid in RANGES:
        check_range(valid.key, settings.get(valid.key))


def check_range(key: str, value: Any) -> None:
    """Refuse a value of one key.

    Args:
        key: Its name; the values of most have no range here.
        value: A value of the right type.

    Raises:
        UserError: It is out of range.
    """
    for valid in RANGES:
        if valid.key == key and not valid.accepts(value):
            raise UserError(f"{key} is {_shown(value)}; {valid.remedy}")


def _shown(value: Any) -> str:
    """Format a value as YAML does."""
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    text = str(value) or "empty"
    return (text if len(text) <= 80 else f"{text[:77]}...").encode("unicode_escape").decode()
