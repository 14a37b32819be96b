"""A run that is asked to stop ends between two meta-steps, with nothing lost."""

import subprocess
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from maml_pipeline import signals
from maml_pipeline.learner import lightning_internals
from maml_pipeline.signals import Response, Stopped

SECONDS_TO_END = 3


class StopOnSignal(Callback):
    """Stops training before the next meta-step once a signal asked for it.

    The signal is noted and no more. Lightning's own handler saves a checkpoint where the signal comes,
    which can be in the middle of an update or of a collective operation, and hangs (Lightning#21406).
    Before training and after it, a signal stops the run at once.
    """

    def __init__(self) -> None:
        self._stops = False
        self._trains = False
        self._replaced: signals.Handlers = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from installing handlers of its own."""
        lightning_internals.disable_signal_handlers(trainer)
        self._trains = self._trains or stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, only note a signal."""
        self._replaced = signals.install()
        signals.respond(Response.NOTE, announces=trainer.is_global_zero)
        signals.raise_if_requested()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once from now on: the trained state is saved, and a test begins anew."""
        meta_steps = trainer.global_step if self._trains else None
        signals.respond(Response.RAISE, meta_steps=meta_steps)
        signals.raise_if_requested()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Stop here where a library has swallowed the exception that the signal raised."""
        signals.raise_if_requested()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the handlers away again, outside of the `maml` command."""
        signals.restore(self._replaced)
        self._replaced = {}

    def is_wanted(self, trainer: Trainer) -> bool:
        """Tell whether training is to stop here; every rank must ask, at the same meta-step.

        The signal may reach one rank alone, or each at another meta-step.
        """
        wants = signals.requested() is not None
        self._stops = trainer.strategy.reduce_boolean_decision(wants, all=False)
        return self._stops

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop where it was agreed on: the meta-step before is done, logged, validated and saved."""
        if self._stops:
            raise Stopped(signals.requested(), trainer.global_step, by_all=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the ranks that Lightning has started, where this one stops without having asked them."""
        signals.restore(self._replaced)
        if isinstance(exception, Stopped) and not exception.by_all:
            _end_ranks(lightning_internals.launched_processes(trainer))


def _end_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # it waits for this rank, in code that no signal reaches
            process.kill()
