"""Check that epochs and validations, which Lightning counts in batches, fall between meta-steps."""

from typing import Any

from maml_pipeline.errors import UserError


def check_epochs(trainer: Any) -> None:
    """Refuse settings with which an epoch or a validation never happens, or falls within a meta-step.

    An epoch ends after `limit_train_batches` batches, and never without that setting.

    Args:
        trainer: The settings of `trainer`, each within its range.

    Raises:
        UserError: The settings contradict each other.
    """
    limit, every = trainer.limit_train_batches, trainer.check_val_every_n_epoch
    if isinstance(limit, int):
        _check_epochs_of(limit, trainer)
    elif limit is not None and limit != 1.0:
        raise UserError(
            f"trainer.limit_train_batches is {limit}, but an endless stream of tasks has no "
            "fraction; set the number of batches per epoch"
        )
    elif trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.max_steps == -1:
        raise UserError(
            f"trainer.max_epochs is {trainer.max_epochs}, but the one epoch never ends; set "
            "trainer.max_steps, or trainer.limit_train_batches to the batches per epoch"
        )
    elif every is not None and every > 1:
        raise UserError(
            f"trainer.check_val_every_n_epoch is {every}, but the one epoch never ends; set "
            "trainer.val_check_interval to the meta-steps between two validations, or "
            "trainer.limit_train_batches to the batches per epoch"
        )


def _check_epochs_of(batches: int, trainer: Any) -> None:
    accumulated = trainer.accumulate_grad_batches
    if batches % accumulated:
        raise UserError(
            f"trainer.limit_train_batches is {batches}, which trainer.accumulate_grad_batches "
            f"{accumulated} does not divide: an epoch would end in the middle of a meta-step; name a "
            f"multiple of {accumulated}"
        )
    meta_steps, every = batches // accumulated, trainer.check_val_every_n_epoch
    if every is not None and trainer.val_check_interval > meta_steps:
        raise UserError(
            f"trainer.val_check_interval is {trainer.val_check_interval}, but with "
            f"trainer.check_val_every_n_epoch {every} it counts within an epoch, which has {meta_steps} "
            "meta-steps; name at most as many, or set check_val_every_n_epoch to null to count over "
            "all epochs"
        )
