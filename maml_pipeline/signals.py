"""Handling signals that ask a command to stop; learner/preemption.py describes the whole sequence."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Time limit in 2 minutes (`sbatch --signal=SIGUSR1@120`), preemption, Ctrl-C, closed terminal."""

SECONDS_TO_INTERRUPT = 1.0


Handlers = dict[signal.Signals, Any]
"""Signal handlers, in any form that `signal.signal` accepts."""


class Stopped(BaseException):
    """A command stopped because of a signal.

    Not an `Exception`, so that no library handles it as a failure.

    Args:
        signum: The signal; `None` if only another rank received one.
        meta_steps: Meta-steps done by a run whose state is saved.
        by_all: Whether all ranks have agreed to stop here.
        remark: Further information for the user.
    """

    def __init__(
        self,
        signum: signal.Signals | None,
        meta_steps: int | None = None,
        by_all: bool = False,
        remark: str = "",
    ) -> None:
        super().__init__(signum, meta_steps, by_all, remark)
        self.signum = signum
        self.meta_steps = meta_steps
        self.by_all = by_all
        self.remark = remark
        self.resume_command: str | None = None
        """The command that resumes the run; set by the command that knows the run folder."""

    @property
    def exit_status(self) -> int:
        """The exit status that shells report for a process ended by the signal."""
        return 128 + (self.signum or signal.SIGTERM)


class Response(Enum):
    """Response to the first signal. A second Ctrl-C interrupts immediately."""

    EXIT = "end the process: nothing has been done yet"
    RAISE = "raise `Stopped` immediately"
    NOTE = "note the signal; training checks for it between meta-steps"


class _State:
    """State of this process, like its signal handlers."""

    is_listening = False
    requested: signal.Signals | None = None
    response = Response.RAISE
    announces = False
    meta_steps: int | None = None
    interrupted = threading.Event()


@contextlib.contextmanager
def listening(first: Response) -> Iterator[None]:
    """Handle signals within the context; in the main thread only.

    Args:
        first: The response until `respond` sets another.
    """
    if threading.current_thread() is not threading.main_thread() or _State.is_listening:
        yield
        return
    with _acknowledging():
        replaced = install()
        try:
            _State.is_listening = True
            respond(first)
            yield
        finally:
            _State.is_listening = False
            restore(replaced)


def install() -> Handlers:
    """Install the handlers, unless `listening` has.

    A signal that is ignored, such as by `nohup`, stays ignored.

    Returns:
        The handlers that were replaced, for `restore`.
    """
    if _State.is_listening or threading.current_thread() is not threading.main_thread():
        return {}
    _State.requested = None
    _State.interrupted.clear()
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    replaced = {signum: old for signum, old in before.items() if old is not signal.SIG_IGN}
    for signum in replaced:
        signal.signal(signum, _handle)
    return replaced


def restore(replaced: Handlers) -> None:
    """Restore the handlers that `install` replaced."""
    if not replaced:
        return
    for signum, handler in replaced.items():
        signal.signal(signum, handler)
    _State.requested = None
    respond(Response.RAISE)


def respond(response: Response, announces: bool = False, meta_steps: int | None = None) -> None:
    """Set the response to signals from now on.

    Args:
        response: The response to the first signal.
        announces: Whether `Response.NOTE` immediately acknowledges a signal on stderr.
        meta_steps: Meta-steps done by a run whose state is saved, for `Stopped`.
    """
    _State.response, _State.announces, _State.meta_steps = response, announces, meta_steps


def requested() -> signal.Signals | None:
    """Return the first signal received, if any."""
    return _State.requested


def raise_if_requested() -> None:
    """Stop here if a signal was received.

    Raises:
        Stopped: A signal was received.
    """
    if _State.requested is not None:
        raise Stopped(_State.requested, _State.meta_steps)


def was_interrupted() -> bool:
    """Tell whether a second Ctrl-C was received, so that nothing slow should be started."""
    return _State.interrupted.is_set()


def exit_if_interrupted() -> None:
    """End this process after a second Ctrl-C, without waiting for exit handlers of libraries."""
    if was_interrupted():
        _exit("maml: interrupted", 128 + signal.SIGINT)


def _handle(signum: int, frame: FrameType | None) -> None:
    if _State.requested is not None:
        # Slurm may repeat a signal; only a second Ctrl-C changes the response.
        if signum == signal.SIGINT:
            _State.interrupted.set()
            raise KeyboardInterrupt
        return
    _State.requested = signal.Signals(signum)
    if _State.response is Response.EXIT:
        _exit(f"maml: stopped by {_State.requested.name} while it was starting", 128 + signum)
    if _State.response is Response.RAISE:
        raise_if_requested()


def _exit(message: str, status: int) -> NoReturn:
    """End this process without an exception, which C code may swallow or turn into an abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _say(message)
    os._exit(status)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed
        # The current line of a terminal may hold a progress bar.
        before = "\n" if os.isatty(2) else ""
        os.write(2, f"{before}{message}\n".encode())


@contextlib.contextmanager
def _acknowledging() -> Iterator[None]:
    """Acknowledge signals from a thread, because Python's handlers wait for C code to return."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    thread = threading.Thread(target=_acknowledge, args=[read_end], name="signals", daemon=True)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)
        thread.join()
        os.close(read_end)


def _acknowledge(read_end: int) -> None:
    is_first = True
    while came := os.read(read_end, 1):  # the signal's number, written by Python's handler in C
        signum = came[0]
        if signum not in SIGNALS:
            continue
        if is_first and _State.response is Response.NOTE and _State.announces:
            _say(
                "Stopping after the current meta-step; Ctrl-C again to stop at once"
                if signum == signal.SIGINT
                else f"{signal.Signals(signum).name}: stopping after the current meta-step"
            )
        elif (
            not is_first
            and signum == signal.SIGINT
            and not _State.interrupted.wait(SECONDS_TO_INTERRUPT)
        ):
            _exit("maml: interrupted", 128 + signal.SIGINT)
        is_first = False
