"""Asking Slurm about jobs: whether they wait, run or have ended, and why."""

import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED", "RESIZING")
"""States of jobs that have not ended. A job that is COMPLETING may be about to be requeued."""

FAILED = ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL")

SECONDS_TO_ANSWER = 5
"""A busy controller may take longer; the runs are then listed without their jobs."""

UNKNOWN_JOB = "Invalid job id specified"
"""The error of squeue for a single job that it does not know; among several it just leaves it out."""

_ID = re.compile(r"[0-9]+(_[0-9]+)?")
_SQUEUE = ("JobArrayID", "State", "RestartCnt", "exit_code", "TimeLimit", "Reason", "WorkDir", "STDOUT")
_SACCT = ("JobID", "State", "ExitCode", "Timelimit")


class NoAnswerError(Exception):
    """Slurm did not say whether it knows a job."""


@dataclass(frozen=True)
class Job:
    """What Slurm knows about a job, or about one element of a job array.

    Args:
        id: `<job>`, or `<array>_<index>`.
        state: As Slurm spells it, such as `PENDING`.
        restarts: How often it was requeued.
        reason: Why it waits, such as `Resources`, or why it ended, such as `NonZeroExitCode`; empty if
            there is none.
        exit_status: Its exit status; 128 and more after a signal.
        time_limit: As `days-hours:minutes:seconds`; empty if unknown.
        output: Its output file, if known.
    """

    id: str
    state: str
    restarts: int = 0
    reason: str = ""
    exit_status: int = 0
    time_limit: str = ""
    output: Path | None = None

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def is_running(self) -> bool:
        return self.state in RUNNING

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.is_waiting or self.is_running

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with an error, not because it was cancelled or reached its time limit."""
        return self.state in FAILED


def find_jobs(
    ids: Collection[str], accounted: Collection[str] = (), needs_answer: bool = False
) -> dict[str, Job]:
    """Ask Slurm about jobs, in one call of squeue and at most one of sacct.

    squeue knows a job for some minutes after its end; after that, sacct does where the cluster has
    accounting.

    Args:
        ids: Ids of jobs, or of elements of arrays (`12_3`).
        accounted: Those about which sacct is asked if squeue does not know them.
        needs_answer: Whether a squeue that does not answer is an error.

    Returns:
        The jobs that Slurm knows, by id. Empty where there is no Slurm, or if it does not answer.

    Raises:
        NoAnswerError: squeue failed or was too slow, and `needs_answer` is set.
    """
    ids = {*filter(_ID.fullmatch, ids)}
    if not ids:
        return {}
    columns = ",".join(f"{column}:|" for column in _SQUEUE)
    options = ["--noheader", "--array", "--states=all", f"--Format={columns}"]
    lines = _ask("squeue", *options, f"--jobs={','.join(sorted(ids))}")
    if lines is None and needs_answer:
        raise NoAnswerError
    jobs = {job.id: job for job in map(_read_squeue, lines or ()) if job is not None and job.id in ids}
    if missing := sorted(ids & {*accounted} - {*jobs}):
        options = ["--allocations", "--noheader", "--parsable2", f"--format={','.join(_SACCT)}"]
        lines = _ask("sacct", *options, f"--jobs={','.join(missing)}") or []
        jobs |= {job.id: job for job in map(_read_sacct, lines) if job is not None and job.id in missing}
    return jobs


def find_submitted(job: str) -> Job:
    """Return what Slurm knows about a job that was just submitted: at least that it waits."""
    return find_jobs([job]).get(job, Job(job, "PENDING"))


def _ask(*command: str) -> list[str] | None:
    """Return the lines that a command of Slurm prints: none if it is missing, or knows no such job.

    Returns:
        `None` if it fails or is too slow.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS_TO_ANSWER
        )
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return [] if UNKNOWN_JOB in done.stderr else None
    return done.stdout.splitlines()


def _read_squeue(line: str) -> Job | None:
    values = line.split("|", len(_SQUEUE) - 1)
    if len(values) < len(_SQUEUE):
        return None
    job, state, restarts, status, limit, reason, folder, output = (value.strip() for value in values)
    code = int(status) if status.isdigit() else 0  # as returned by wait(2)
    return Job(
        job,
        state,
        int(restarts) if restarts.isdigit() else 0,
        _reason(reason),
        code >> 8 or (128 + code if code else 0),
        limit,
        _output(output.rstrip("|"), job, Path(folder)),
    )


def _read_sacct(line: str) -> Job | None:
    values = line.split("|")
    if len(values) != len(_SACCT):
        return None
    job, state, code, limit = values
    status, _, signum = code.partition(":")
    if signum.isdigit() and int(signum):
        exit_status = 128 + int(signum)
    else:
        exit_status = int(status) if status.isdigit() else 0
    return Job(
        job, state.partition(" ")[0], exit_status=exit_status, time_limit=limit
    )  # CANCELLED by 1000


def _reason(text: str) -> str:
    return "" if text in ("None", "N/A", "(null)", "") else text


def _output(pattern: str, job: str, folder: Path) -> Path | None:
    """Return a job's output file; `None` if its name has a field that only Slurm can fill in."""
    array, _, index = job.partition("_")
    fields = {"%A": array, "%a": index, "%j": job if not index else "", "%%": "%"}
    for field, value in fields.items():
        if value:
            pattern = pattern.replace(field, value)
    return folder / pattern if pattern and "%" not in pattern else None
