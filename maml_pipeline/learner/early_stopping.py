"""Ending training before `trainer.max_steps`: by a time limit, or by EarlyStopping."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, Timer
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.learner import lightning_internals


class EndEarly(Checkpoint):
    """End training after a whole meta-step, say why, and keep it ended when the run is resumed.

    Training that was ended by a metric does not resume, as it would with Lightning alone. A time limit
    covers all parts of a run, so a longer limit continues it.

    A `Checkpoint`, because Lightning calls checkpoint callbacks after all others, in the order of the
    list: the last state is saved after this callback has noted that training ended.
    """

    def __init__(self) -> None:
        self._ended_by: list[str] = []
        self._stops_after_meta_step = False
        self._stopped_before_validation = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make EarlyStopping check after a validation and before the last state is saved."""
        for callback in trainer.early_stopping_callbacks:
            lightning_internals.check_after_validation(callback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End training at once if a metric has ended it under the same conditions."""
        is_ended = bool(self._ended_by) and self._ended_by == _conditions(trainer)
        trainer.should_stop = trainer.should_stop or is_ended

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Postpone a stop to the end of the current meta-step."""
        self._stops_after_meta_step = self._stops_after_meta_step or trainer.should_stop
        if self._stops_after_meta_step:
            trainer.should_stop = not lightning_internals.is_within_meta_step(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether training ends regardless of the validation."""
        self._stopped_before_validation = trainer.should_stop

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation ended training; the last state, saved next, includes this."""
        if trainer.state.fn == "fit" and trainer.should_stop and not self._stopped_before_validation:
            self._ended_by = _conditions(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print why training ended early."""
        if trainer.should_stop and trainer.global_step != trainer.max_steps:
            _print(f"Training ended after meta-step {trainer.global_step:,}: {_reason(trainer)}")

    def state_dict(self) -> dict[str, Any]:
        """Return the conditions under which the training ended."""
        return {"ended_by": self._ended_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the conditions from a checkpoint."""
        self._ended_by = state_dict["ended_by"]


def _conditions(trainer: Trainer) -> list[str]:
    """Return the conditions under which a metric ends training."""
    names = ("monitor", "mode", "patience", "min_delta", "stopping_threshold", "divergence_threshold")
    return [
        ", ".join(f"{name} {getattr(callback, name)}" for name in names)
        for callback in trainer.early_stopping_callbacks
    ]


def _reason(trainer: Trainer) -> str:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, Timer):
            remaining = callback.time_remaining()
            if remaining is not None and remaining <= 0:
                return (
                    "time limit reached (trainer.max_time or a Timer); to resume, raise it and add "
                    "--ckpt_path last"
                )
        message = getattr(callback, "stopping_reason_message", None)
        if isinstance(callback, EarlyStopping) and message:
            return f"EarlyStopping: {message.removesuffix(' Signaling Trainer to stop.')}"
    return "a callback ended it, now or in an earlier part of the run"


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)
