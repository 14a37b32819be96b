"""Worker processes that draw tasks: sending them the tasks, and their handling of signals."""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.signals import SIGNALS

SECONDS_TO_SERVE = 600
"""Time for the current meta-step, and a validation after it, after SIGTERM."""


class _Discard:
    """A file that discards what is pickled into it, since tasks may hold a whole data set."""

    def write(self, data: Any) -> int:
        return len(data)


def check_picklable(tasks: object) -> None:
    """Check that tasks can be pickled, as spawned worker processes require.

    Raises:
        UserError: They hold an object that cannot be pickled, such as a lambda.
    """
    try:
        pickle.Pickler(_Discard()).dump(tasks)
    except Exception as error:  # pickling calls the user's code
        raise UserError(
            f"data.tasks: {type(tasks).__name__} cannot be sent to worker processes "
            f"({str(error).splitlines()[0]}): define what it holds at the top of a module, or set "
            "data.num_workers to 0"
        ) from error


def outlive_signals(worker: int) -> None:
    """Keep a worker running for the current meta-step when a signal asks the run to stop.

    Slurm sends signals to all processes. A worker ends when PyTorch tells it to, or when its parent is
    gone. To one that is stuck in a task PyTorch sends SIGTERM, which therefore ends it after a delay.
    """
    for signum in SIGNALS:
        signal.signal(signum, _end_later if signum == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals for processes that are started within, which at first have no handlers."""
    resource_tracker.ensure_running()  # its start would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_later(signum: int, frame: FrameType | None) -> None:
    timer = threading.Timer(SECONDS_TO_SERVE, os._exit, args=[0])
    timer.daemon = True
    timer.start()
