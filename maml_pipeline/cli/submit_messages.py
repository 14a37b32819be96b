"""What `maml submit` prints: the jobs, where their runs and outputs are, and what to type next."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from maml_pipeline import run_folder
from maml_pipeline.slurm.allocation import Allocation
from maml_pipeline.slurm.queue import Job
from maml_pipeline.text import counted, printable

MAX_LISTED = 20
"""Elements of an array that are listed."""


def print_submitted_run(job: Job, name: str, folder: Path, requested: Allocation) -> None:
    """Print the job of a run.

    Args:
        job: What Slurm knows about it.
        name: The run's name.
        folder: The run's folder.
        requested: What the job requests.
    """
    print(f"Submitted job {job.id}: {printable(name)} on {requested}{_limit(job)}")
    print(f"Run folder: {printable(folder)}")
    if job.output is not None:
        print(f"Output: {printable(_shown(job.output))}")
    follow = [] if job.output is None else [["tail", "-F", _shown(job.output)]]
    _print_next(folder, *follow, ["scancel", job.id])


def print_submitted_array(
    jobs: Mapping[str, Job], cells: Mapping[str, Path], folder: Path, requested: Allocation
) -> None:
    """Print the jobs of a trade-off's cells.

    Args:
        jobs: What Slurm knows about each element of the array, by its id.
        cells: The folder of the cell that each element trains.
        folder: The trade-off's folder.
        requested: What each job requests.
    """
    array = next(iter(cells)).partition("_")[0]
    limit = _limit(next(iter(jobs.values()), None))
    trained = f"{counted(len(cells), 'cell')} of {printable(folder)}"
    print(f"Submitted array {array}: {trained}, each on {requested}{limit}")
    width = max(map(len, cells))
    for element, cell in [*cells.items()][:MAX_LISTED]:
        print(f"  {element:<{width}} {printable(cell / run_folder.LOG)}")
    if len(cells) > MAX_LISTED:
        print(f"  and {len(cells) - MAX_LISTED:,} more, up to {[*cells][-1]}")


def print_submitted_report(job: Job, array: str | None, folder: Path) -> None:
    """Print the job that writes the report of a trade-off.

    Args:
        job: What Slurm knows about it.
        array: The id of the array that it waits for, if any.
        folder: The trade-off's folder.
    """
    page = folder / run_folder.REPORT / "report.html"
    output = "" if job.output is None else f", output {printable(_shown(job.output))}"
    print(f"Submitted job {job.id}: the report, {printable(page)}{output}")
    jobs = [job.id] if array is None else [array, job.id]
    _print_next(folder, ["scancel", *jobs])


def _limit(job: Job | None) -> str:
    if job is None or not job.time_limit[:1].isdigit():  # such as UNLIMITED
        return ""
    return f", for at most {job.time_limit}"


def _shown(path: Path) -> str:
    """Return a path relative to the working directory if it lies there."""
    folder = Path(os.getcwd())
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _print_next(folder: Path, *commands: list[str]) -> None:
    listed = [] if run_folder.RUNS in folder.parents else [str(folder)]  # `maml runs` lists runs/
    meanwhile = [shlex.join(command) for command in (["maml", "runs", *listed], *commands)]
    print("Meanwhile: " + "\n           ".join(map(printable, meanwhile)))
    print(f"When it has ended: {printable(shlex.join(['maml', 'report', str(folder)]))}")
