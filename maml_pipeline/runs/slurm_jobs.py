"""The Slurm jobs of runs, by the record in their folders."""

from collections.abc import Iterable
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import JOB, TEST, read_slurm_job
from maml_pipeline.slurm.queue import Job, NoAnswerError, find_jobs


def jobs_of(folders: Iterable[Path], needs_answer: bool = False) -> dict[Path, Job]:
    """Return the Slurm job that trains each run, will train it, or did so last.

    Slurm is asked once for all runs, and not at all if none has a job.

    Args:
        folders: The folders of runs.
        needs_answer: Whether it is an error if Slurm does not answer.

    Returns:
        The jobs that Slurm still knows, by folder.

    Raises:
        UserError: Slurm did not answer, and `needs_answer` is set.
    """
    recorded = {folder: job for folder in folders if (job := read_slurm_job(folder)) is not None}
    unfinished = {job for folder, job in recorded.items() if not (folder / TEST).exists()}
    try:
        jobs = find_jobs({*recorded.values()}, accounted=unfinished, needs_answer=needs_answer)
    except NoAnswerError as error:
        folder, job = next(iter(recorded.items()))
        raise UserError(
            f"Slurm does not say whether job {job} of {folder} has ended; try again, or remove "
            f"{folder / JOB} if it has"
        ) from error
    return {folder: jobs[job] for folder, job in recorded.items() if job in jobs}


def active_jobs(folders: Iterable[Path]) -> dict[Path, Job]:
    """Return the Slurm job of each run whose job waits or runs.

    Raises:
        UserError: Slurm did not answer: a second job in a folder would do harm.
    """
    jobs = jobs_of(folders, needs_answer=True)
    return {folder: job for folder, job in jobs.items() if job.is_active}
