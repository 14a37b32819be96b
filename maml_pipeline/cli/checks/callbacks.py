"""Refuse Lightning callbacks that cannot work with an endless stream of tasks."""

from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from maml_pipeline.errors import UserError
from maml_pipeline.learner.lightning_internals import checks_at_epoch_end, checks_every_step

NO_EPOCHS = "it acts per epoch, but the stream of tasks has no epochs"
OTHER_WEIGHTS = "a resumed run would end with other weights than an uninterrupted one"

REFUSED: dict[type[Callback], str] = {
    BackboneFinetuning: f"{NO_EPOCHS}; freeze parameters with requires_grad in the network",
    BaseFinetuning: f"{NO_EPOCHS}; freeze parameters with requires_grad in the network",
    BatchSizeFinder: "data.meta_batch_size changes the training; choose it, and bound memory with "
    "model.tasks_per_chunk",
    GradientAccumulationScheduler: f"{NO_EPOCHS}; set trainer.accumulate_grad_batches",
    LearningRateFinder: "it trains before training; set the learning rate of model.optimizer",
    ModelPruning: "it replaces the parameters that are meta-learned",
    ProgressBar: "a training has its own; set trainer.enable_progress_bar to false for none",
    StochasticWeightAveraging: OTHER_WEIGHTS,
    WeightAveraging: OTHER_WEIGHTS,
}
"""Why each cannot work, and what to use instead."""


def check_callbacks(
    callbacks: Callback | list[Callback] | None, monitored: list[str], command: str
) -> None:
    """Refuse callbacks that cannot work, or that monitor a metric which the run does not log.

    Args:
        callbacks: The callbacks of the configuration.
        monitored: Names of the metrics that a validation logs.
        command: `fit`, `validate` or `test`; only the first saves checkpoints.

    Raises:
        UserError: A callback cannot work.
    """
    for callback in as_list(callbacks):
        name = type(callback).__name__
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise UserError(f"trainer.callbacks has {name}, which cannot work here: {reason}")
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in monitored:
            raise UserError(
                f"trainer.callbacks: {name} monitors {monitor}; a validation logs "
                f"{', '.join(monitored[:4])}, ..."
            )
        if isinstance(callback, EarlyStopping) and checks_at_epoch_end(callback):
            raise UserError(
                "trainer.callbacks: check_on_train_epoch_end is true, but the epoch never ends here; "
                f"leave it out, so that {name} checks after each validation"
            )
        if command == "fit" and _saves_in_the_run(callback):
            raise UserError(
                f"trainer.callbacks: {name} would write over best.ckpt or last.ckpt of the run; set its "
                "dirpath to another folder"
            )
        if isinstance(callback, Timer) and not checks_every_step(callback):
            raise UserError(
                "trainer.callbacks: the interval of Timer is epoch, but the epoch never ends here; "
                "leave it out for step"
            )


def _saves_in_the_run(callback: Callback) -> bool:
    """Tell whether a callback saves under the names of a run's own checkpoints, in their folder."""
    if not isinstance(callback, ModelCheckpoint):
        return False
    takes_a_name = bool(callback.save_last) or callback.filename in ("best", "last")
    return callback.dirpath is None and takes_a_name


def as_list(value: Any) -> list[Any]:
    """Return a list of no, one or several items."""
    return value if isinstance(value, list) else [] if value is None else [value]
