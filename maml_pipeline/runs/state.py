"""The state of a run: whether it is finished, running, stopped or failed, or waits in Slurm's queue."""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from maml_pipeline.locks import is_locked
from maml_pipeline.run_folder import CONFIG, LOCK, LOG, TEST, read_slurm_output
from maml_pipeline.runs.run import Run
from maml_pipeline.slurm.queue import Job

LOG_START = "\nRun folder: "
"""Begins the output of each attempt in a log."""

ERRORS = ("maml: error: ", "slurm: error: ")
TRACEBACK = "Traceback (most recent call last):"
"""Beginnings of the line with which an attempt reports that it failed."""

DIVERGED = re.compile(r"the loss is (nan|-?inf) at ")
"""Begins the error of a run whose loss is not finite, see `inner_loop.check_finite`."""

LOG_TAIL_BYTES = 100_000


class RunState(StrEnum):
    """What a run is doing, in the order of a sorted list."""

    RUNNING = "running"
    """A process has locked its folder, or its Slurm job runs."""
    QUEUED = "queued"
    """Its Slurm job has not started."""
    REQUEUED = "requeued"
    """Its Slurm job was stopped, and waits to resume it."""
    STOPPED = "stopped"
    """It is not finished, and no process works on it: it was stopped, killed, or has failed without a
    log. It can be resumed."""
    FAILED = "failed"
    """Its log ends with an error, or its Slurm job has failed."""
    FINISHED = "finished"
    """It is trained and tested."""


@dataclass(frozen=True)
class Situation:
    """The state of a run, and why it is in this state.

    Args:
        state: The state; `None` if it is unknown.
        job: The id of the Slurm job that trains the run or will train it, or with which it failed.
        reason: Why the job waits, or why the run stopped or failed; empty if it is unknown.
    """

    state: RunState | None
    job: str | None = None
    reason: str = ""


def run_state(run: Run, job: Job | None = None) -> RunState | None:
    """Return the state of a run; `None` if it is unfinished and not in a run's folder.

    A W&B log or the summary of a trade-off does not tell whether training continues.

    Args:
        run: The run.
        job: Its Slurm job, if Slurm knows it.
    """
    return situation(run, job).state


def situation(run: Run, job: Job | None = None) -> Situation:
    """Return the state of a run with its reason; the arguments are those of `run_state`."""
    if not (run.source / CONFIG).is_file():
        return Situation(RunState.FINISHED if run.is_finished else None)
    return folder_situation(run.source, job, run.is_finished)


def folder_situation(folder: Path, job: Job | None = None, is_finished: bool = False) -> Situation:
    """Return the state of the run in a folder with its reason.

    Args:
        folder: The run's folder; its config may be missing or damaged.
        job: Its Slurm job, if Slurm knows it.
        is_finished: Whether the run is known to be finished.
    """
    number = None if job is None else job.id
    if is_locked(folder / LOCK):
        return Situation(RunState.RUNNING, number if job is not None and job.is_running else None)
    is_finished = is_finished or (folder / TEST).exists()  # tested since it was read
    if job is not None and job.is_waiting and not (is_finished and job.restarts):
        # A requeued job may have several runs, of which this one is finished.
        return Situation(RunState.REQUEUED if job.restarts else RunState.QUEUED, number, job.reason)
    if is_finished:
        return Situation(RunState.FINISHED)
    if job is not None and job.is_running:
        return Situation(RunState.RUNNING, number)
    output = read_slurm_output(folder)
    for log in (folder / LOG, *(() if output is None else (output,))):
        if error := last_error(log):
            return Situation(RunState.FAILED, number, error)
    if job is None:
        return Situation(RunState.STOPPED)
    return Situation(RunState.FAILED if job.has_failed else RunState.STOPPED, number, _end(job))


def has_diverged(run: Run) -> bool:
    """Tell whether a run stopped because its loss was not finite, as its log or a summary tells."""
    if run.is_finished:
        return False
    return run.is_known_to_diverge or DIVERGED.match(situation(run).reason) is not None


def _end(job: Job) -> str:
    """Describe how a job has ended that left no error message: `timeout`, or `exit status 137`."""
    if job.state == "FAILED":
        return f"exit status {job.exit_status}"
    return "" if job.state == "COMPLETED" else job.state.lower().replace("_", " ")


def last_error(log: Path) -> str:
    """Return the error message of the last attempt in a log; empty if it did not report one.

    A run that Slurm did not start has no log, unless it is in a trade-off.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - LOG_TAIL_BYTES, 0))
            tail = file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    _, _, last_attempt = f"\n{tail}".rpartition(LOG_START)
    lines = [line for line in last_attempt.splitlines() if line.strip()]
    for number, line in reversed([*enumerate(lines)]):
        if line.startswith(ERRORS):
            return line.partition(": error: ")[2]
        if line.startswith(TRACEBACK):
            return next((text for text in lines[number + 1 :] if not text.startswith(" ")), line)
    return ""
