"""The Slurm jobs of runs, by the record in their folders."""

from collections.abc import Iterable
from pathlib import Path

from maml_pipeline.run_folder import TEST, read_slurm_job
from maml_pipeline.slurm.queue import Job, find_jobs


def jobs_of(folders: Iterable[Path]) -> dict[Path, Job]:
    """Return the Slurm job that trains each run, will train it, or did so last.

    Slurm is asked once for all runs, and not at all if none has a job.

    Args:
        folders: The folders of runs.

    Returns:
        The jobs that Slurm still knows, by folder.
    """
    recorded = {folder: job for folder in folders if (job := read_slurm_job(folder)) is not None}
    unfinished = {job for folder, job in recorded.items() if not (folder / TEST).exists()}
    jobs = find_jobs({*recorded.values()}, accounted=unfinished)
    return {folder: jobs[job] for folder, job in recorded.items() if job in jobs}


def active_jobs(folders: Iterable[Path]) -> dict[Path, Job]:
    """Return the Slurm job of each run whose job waits or runs."""
    return {folder: job for folder, job in jobs_of(folders).items() if job.is_active}
