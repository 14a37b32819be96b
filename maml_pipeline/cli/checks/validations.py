"""Check that there are validations where something in the training acts on them."""

from typing import Any

from jsonargparse import Namespace
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping
from torch.optim.lr_scheduler import ReduceLROnPlateau

from maml_pipeline.cli.checks.callbacks import as_list
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner


def check_validations(
    trainer: Namespace, callbacks: Callback | list[Callback] | None, model: MetaLearner
) -> None:
    """Refuse early stopping and a schedule that wait for a validation which never happens.

    Args:
        trainer: The settings of `trainer`, already checked.
        callbacks: Its callbacks, instantiated.
        model: The model, whose optimizer and schedule can be built.

    Raises:
        UserError: There is no validation, but something acts on its results.
    """
    reason = _reason_for_none(trainer)
    if reason is None:
        return
    for callback in as_list(callbacks):
        if isinstance(callback, EarlyStopping):
            raise UserError(f"trainer.callbacks has {type(callback).__name__}, but {reason}")
    schedule = _schedule(model)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(f"model.lr_scheduler is {type(schedule).__name__}, but {reason}")


def _reason_for_none(trainer: Namespace) -> str | None:
    """Tell why a training has no validation, with the remedy; `None` if it has one."""
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0, so that it never acts; validate, or leave it out"
    first, end = _meta_steps(trainer)
    if first <= end:
        return None
    return (
        f"training ends at meta-step {end:.0f}, before the first validation at {first}; set a smaller "
        "trainer.val_check_interval, or leave it out"
    )


def _meta_steps(trainer: Namespace) -> tuple[int, float]:
    """Return the meta-step of the first validation, and that of the end of training."""
    first: int = trainer.val_check_interval
    end = float("inf") if trainer.max_steps < 0 else trainer.max_steps
    if isinstance(trainer.limit_train_batches, int):
        of_epoch = trainer.limit_train_batches // trainer.accumulate_grad_batches
        first += ((trainer.check_val_every_n_epoch or 1) - 1) * of_epoch
        end = min(end, trainer.max_epochs * of_epoch) if (trainer.max_epochs or -1) > 0 else end
    return first, end


def _schedule(model: MetaLearner) -> Any:
    built = model.configure_optimizers()
    return built["lr_scheduler"]["scheduler"] if isinstance(built, dict) else None
