"""Epochs and validations, which Lightning counts in batches, in whole meta-steps."""

from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.task import check_at_least


def check_epochs(trainer: Any) -> None:
    """Refuse settings under which an epoch or a validation never comes, or comes within a meta-step.

    An epoch ends after `limit_train_batches` batches; without it the tasks never end.

    Args:
        trainer: The trainer's settings, under their names on the command line.

    Raises:
        UserError: They do not fit together.
    """
    limit, accumulated = trainer.limit_train_batches, trainer.accumulate_grad_batches
    check_at_least("trainer.accumulate_grad_batches", accumulated, 1)
    if trainer.fast_dev_run:
        return  # Lightning sets all of these itself
    if isinstance(limit, float) and limit != 1.0:
        raise UserError(
            f"trainer.limit_train_batches is {limit}, but tasks come without end and have no such "
            "fraction; name a whole number of batches for each epoch"
        )
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if every is None and isinstance(interval, float):
        raise UserError(
            f"trainer.val_check_interval is {interval}, a share of an epoch; set it to the meta-steps "
            "between two validations"
        )
    if not isinstance(limit, int):
        _check_endless_epoch(trainer)
        return
    check_at_least("trainer.limit_train_batches", limit, 1)
    if limit % accumulated:
        raise UserError(
            f"trainer.limit_train_batches is {limit}, which trainer.accumulate_grad_batches "
            f"{accumulated} does not divide: an epoch would end in the middle of a meta-step; name a "
            f"multiple of {accumulated}"
        )
    meta_steps = limit // accumulated
    if every is not None and isinstance(interval, int) and interval > meta_steps:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but with trainer.check_val_every_n_epoch "
            f"{every} it counts within an epoch, which has {meta_steps} meta-steps; set it to 1.0 for "
            "the end of the epoch, or check_val_every_n_epoch to null to count over all epochs"
        )


def _check_endless_epoch(trainer: Any) -> None:
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps == -1:
        raise UserError(
            f"trainer.max_epochs is {trainer.max_epochs}, but tasks come without end and so does the "
            "epoch; set trainer.max_steps, or trainer.limit_train_batches to the batches of an epoch"
        )
    every = trainer.check_val_every_n_epoch
    if every is not None and (every > 1 or isinstance(trainer.val_check_interval, float)):
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}, but the one epoch has no end; set "
            "trainer.val_check_interval to the meta-steps between two validations, or "
            "trainer.limit_train_batches to the batches of an epoch"
        )


def val_check_batches(val_check_interval: Any, accumulate_grad_batches: int) -> Any:
    """Return `val_check_interval`, which here counts meta-steps, in the batches that Lightning counts.

    Args:
        val_check_interval: A whole number of meta-steps; anything else is returned as it is.
        accumulate_grad_batches: Batches of a meta-step.
    """
    if isinstance(val_check_interval, int):
        return val_check_interval * accumulate_grad_batches
    return val_check_interval
