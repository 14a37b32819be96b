"""A run that is asked to stop ends between two meta-steps, with nothing lost."""

import signal
import threading
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""Of a time limit that is near (`sbatch --signal=SIGUSR1@120`), of a preemption, of Ctrl-C."""


class Stopped(BaseException):
    """The run was asked to stop, and has: its state is saved.

    Not an `Exception`, which something on the way might take for a failure.

    Args:
        signum: The signal that asked; `None` where another rank got it.
        meta_steps: Meta-steps done.
    """

    def __init__(self, signum: signal.Signals | None, meta_steps: int) -> None:
        super().__init__(signum, meta_steps)
        self.signum = signum
        self.meta_steps = meta_steps
        self.resume_command: str | None = None


class StopOnSignal(Callback):
    """Stops training before the next meta-step once a signal asked for it.

    The handler keeps a note and no more. Lightning's own saves a checkpoint inside the handler, which
    can come in the middle of an update or of a collective operation, and hangs (Lightning#21406). A
    second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self._signum: signal.Signals | None = None
        self._is_testing = False
        self._stops = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; Lightning has installed its own handlers before, and takes all away after."""
        self._listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once from now on: the trained state is kept, and a test begins anew."""
        self._is_testing = True
        self._meta_steps = trainer.global_step
        self._listen()
        if self._signum is not None:
            raise Stopped(self._signum, self._meta_steps)

    def is_wanted(self, trainer: Trainer) -> bool:
        """Tell whether training is to stop here; every rank must ask, at the same meta-step.

        The signal may reach one rank alone, or each at another meta-step.
        """
        self._stops = trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        return self._stops

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop where it was agreed on: the meta-step before is done, logged, validated and saved."""
        if self._stops:
            raise Stopped(self._signum, trainer.global_step)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._signum is not None:
            raise KeyboardInterrupt
        self._signum = signal.Signals(signum)
        if self._is_testing:
            raise Stopped(self._signum, self._meta_steps)
