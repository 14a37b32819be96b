"""The state of a run, from what is on disk: whether it is finished, running, stopped or failed."""

from enum import StrEnum
from pathlib import Path

from maml_pipeline.locks import is_locked
from maml_pipeline.run_folder import CONFIG, LOCK, LOG, TEST
from maml_pipeline.runs.run import Run

LOG_START = "\nRun folder: "
"""Begins the output of each attempt in a log."""

ERRORS = ("maml: error: ", "Traceback (most recent call last):")
"""Beginnings of the line with which an attempt reports that it failed."""

LOG_TAIL_BYTES = 100_000


class RunState(StrEnum):
    """What a run is doing, in the order of a sorted list."""

    RUNNING = "running"
    """A process has locked its folder."""
    STOPPED = "stopped"
    """It is not finished, and no process works on it: it was stopped, killed, or has failed without a
    log. It can be resumed."""
    FAILED = "failed"
    """Its log ends with an error."""
    FINISHED = "finished"
    """It is trained and tested."""


def run_state(run: Run) -> RunState | None:
    """Return the state of a run; `None` if it is unfinished and not in a run's folder.

    A W&B log or the summary of a trade-off does not tell whether training continues.
    """
    folder = run.source
    if not (folder / CONFIG).is_file():
        return RunState.FINISHED if run.is_finished else None
    if is_locked(folder / LOCK):
        return RunState.RUNNING
    if run.is_finished or (folder / TEST).exists():  # tested since it was read
        return RunState.FINISHED
    return RunState.FAILED if _ends_with_error(folder / LOG) else RunState.STOPPED


def _ends_with_error(log: Path) -> bool:
    """Tell whether the last attempt in a log failed; a run outside a trade-off has no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - LOG_TAIL_BYTES, 0))
            tail = file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return False
    _, _, last_attempt = f"\n{tail}".rpartition(LOG_START)
    return any(line.startswith(ERRORS) for line in last_attempt.splitlines())
