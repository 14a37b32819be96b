"""A process whose output goes to a log: start it, ask why it failed, and stop several at once."""

import contextlib
import os
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from maml_pipeline import slurm

SECONDS_TO_STOP = 100
"""In a Slurm job, time for the current meta-step, its validation and W&B to finish: the job ends 120 s
after `sbatch --signal=SIGUSR1@120`, and must be requeued before."""


class LoggedProcess:
    """A process that is started immediately, with its output appended to a log.

    Args:
        command: The command line.
        log: The log, which may have the output of earlier processes.
        environment: All its environment variables.
        descriptors: File descriptors that it inherits.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: dict[str, str], descriptors: Sequence[int]
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._earlier_output = output.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=descriptors
            )

    @property
    def exit_status(self) -> int | None:
        """The exit status; `None` while the process runs."""
        return self._process.poll()

    def reason(self) -> str:
        """Return why the process failed: its error message, exit status and log."""
        with self.log.open(errors="replace") as log:
            log.seek(self._earlier_output)
            return f"{error_message(log.read())} (exit status {self.exit_status}; {self.log})"

    def terminate(self) -> None:
        """Ask the process to stop."""
        self._process.terminate()

    def wait(self, until: float | None) -> None:
        """Wait for the end of the process, at most until a time of the monotonic clock, if given."""
        seconds = None if until is None else max(0.0, until - time.monotonic())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> bool:
        """End the process and return true, if it still runs."""
        if self._process.poll() is not None:
            return False
        self._process.kill()
        self._process.wait()
        return True


def stop_all(processes: Collection[LoggedProcess]) -> list[LoggedProcess]:
    """Stop runs after their current meta-step; kill them on a second Ctrl-C.

    In a Slurm job, also kill those that take longer than there is time before the job ends.

    Returns:
        Those that were killed, whose current state is lost.
    """
    try:
        for process in processes:
            process.terminate()
        until = None if slurm.job_id() is None else time.monotonic() + SECONDS_TO_STOP
        for process in processes:
            process.wait(until)
    finally:
        killed = [process for process in processes if process.kill()]
    return killed


def error_message(output: str) -> str:
    """Return the last error message of a run, or else its last line of output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("maml: error: ") for line in lines if line.startswith("maml: error: ")]
    return [*lines[-1:], *errors[-1:]][-1] if lines else "it failed with no error output"
