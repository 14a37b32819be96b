"""Private parts of Lightning that this package depends on: one function each.

Everything here may change in any release of Lightning. `tests/test_internals_lightning.py` holds each
function to what it promises, and fails first after an upgrade.
"""

import inspect
from collections.abc import Callable, Iterable
from subprocess import Popen
from typing import Any, TypeVar

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer, TQDMProgressBar

HookT = TypeVar("HookT", bound=Callable[..., Any])

BATCH_HOOKS = (
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step"),
)
"""The hooks that Lightning calls in every batch of training, of callbacks and of the module."""

# Time of a batch --------------------------------------------------------------------------------

CURRENT_HOOK = "_current_fx_name"
"""The attribute of a LightningModule that names the current hook, set forty times in a batch."""


def remember_signature(hook: HookT) -> HookT:
    """Decorate a hook whose signature Lightning inspects in every batch, to make that quicker."""
    hook.__signature__ = inspect.signature(hook)  # type: ignore[attr-defined]
    return hook


# The training loop ------------------------------------------------------------------------------


def validates_next(trainer: Trainer) -> bool:
    """Tell whether Lightning validates right after the current batch.

    Lightning's own rule, so that a checkpoint waits for exactly the validations that happen. It has no
    public form.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None, "no training is running"
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_within_meta_step(trainer: Trainer) -> bool:
    """Tell whether the optimizer has yet to step for the current batch (`accumulate_grad_batches`).

    Private because Lightning exposes the number of accumulated batches but not where it is among them.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()


def ends_epoch(trainer: Trainer) -> bool:
    """Tell whether the current batch is the last one of its epoch.

    Lightning's own rule, of which the public `trainer.is_last_batch` is only a part.
    """
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def align_logged_step(trainer: Trainer) -> None:
    """Log from now on at `trainer.global_step`.

    Lightning counts the steps of loggers separately. The count of a run that is resumed at its very end,
    with nothing left to train, is one behind, so its test would be logged at another step.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


# Signals and processes --------------------------------------------------------------------------


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keep the trainer from installing signal handlers.

    Lightning has no setting for it. Its SIGTERM handler broadcasts in the middle of other collective
    operations and hangs (Lightning#21406); its loops then exit with status 0, as if training were
    complete.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def launched_processes(trainer: Trainer) -> list[Popen[bytes]]:
    """Return the processes of the ranks that Lightning started from this one; none elsewhere.

    Private because Lightning itself ends them only when another rank has failed.
    """
    return list(getattr(trainer.strategy.launcher, "procs", []))


def starts_ranks_by_script(trainer: Trainer) -> bool:
    """Tell whether further ranks run this process's command again (`popen`), not a spawned function.

    Private because a strategy has no public property for how its processes start.
    """
    return getattr(trainer.strategy, "_start_method", "popen") == "popen"


def chosen_cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """Return what Lightning detected as the starter of the ranks: Slurm, torchrun, itself, ...

    Private because only some strategies have a public `cluster_environment`.
    """
    return trainer._accelerator_connector.cluster_environment


# Callbacks --------------------------------------------------------------------------------------


def skip_empty_hooks(owners: Iterable[Callback | LightningModule]) -> None:
    """Keep Lightning from calling the hooks of a batch that a callback or a module does not define.

    Lightning calls all six of each, and an empty one takes as long as a tensor operation. It has no
    setting for this, but passes over an attribute that is not callable. Everything else about a callback
    stays as it is: its class, its state, its place in `trainer.callbacks`.
    """
    for owner in owners:
        base = Callback if isinstance(owner, Callback) else LightningModule
        for hook in BATCH_HOOKS:
            if getattr(type(owner), hook) is getattr(base, hook):
                setattr(owner, hook, None)


def checks_at_epoch_end(callback: EarlyStopping) -> bool:
    """Tell whether the user set `check_on_train_epoch_end`, which has no getter."""
    return bool(callback._check_on_train_epoch_end)


def check_after_validation(callback: EarlyStopping) -> None:
    """Make EarlyStopping check after each validation.

    Left unset, `check_on_train_epoch_end` is decided by the trainer's defaults; it has no setter.
    """
    callback._check_on_train_epoch_end = False


def checks_every_step(timer: Timer) -> bool:
    """Tell whether a Timer's `interval` is `step`, which has no getter."""
    return timer._interval == "step"


def close_progress_bars(progress: TQDMProgressBar) -> None:
    """Close the bars that were opened; the public properties raise for those that were not."""
    for bar in (
        progress._train_progress_bar,
        progress._val_progress_bar,
        progress._test_progress_bar,
    ):
        if bar is not None:
            bar.close()
