"""The folder of a run that is submitted to Slurm, which the run has from its submission on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically
from maml_pipeline.run_folder import CHECKPOINTS, CONFIG
from maml_pipeline.runs.locked_folder import create_run_folder, remove_empty
from maml_pipeline.runs.slurm_jobs import active_jobs


@contextlib.contextmanager
def reserved_run_folder(folder: Path | None, name: str, config: str) -> Iterator[Path]:
    """Create the folder of a run that a job will train, with the settings that were checked.

    The job reads the settings from there: editing the config while the job waits does not change the
    run. If the block raises, because the job was not submitted, everything is as before.

    Args:
        folder: The folder; `None` for a numbered one.
        name: The run's name, for a numbered folder.
        config: The resolved config, as YAML.

    Yields:
        The folder.

    Raises:
        UserError: The folder cannot be created.
    """
    folder, missing = create_run_folder(folder, name)
    file = folder / CONFIG
    before = file.read_text() if file.exists() else None
    try:
        write_atomically(file, config)
        yield folder
    except BaseException:
        if before is not None:
            write_atomically(file, before)
        else:
            file.unlink(missing_ok=True)
        if missing:
            remove_empty([folder / CHECKPOINTS, *missing])
        raise


def check_no_active_job(folder: Path, remedy: str) -> None:
    """Refuse a folder in which a Slurm job trains, or will.

    Args:
        folder: The run's folder.
        remedy: What to do instead of cancelling that job, with `{job}` for its id.

    Raises:
        UserError: There is such a job, or Slurm does not say whether there is.
    """
    for job in active_jobs([folder]).values():
        does = "waits to train" if job.is_waiting else "is training"
        raise UserError(
            f"Slurm job {job.id} {does} in {folder}; cancel it with `scancel {job.id}`, or "
            f"{remedy.format(job=job.id)}"
        )
