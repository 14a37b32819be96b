"""Opening a run's folder for training: locked by one process, and removed if nothing was saved in it."""

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.locks import AlreadyLockedError, LocksUnsupportedError, locked
from maml_pipeline.run_folder import (
    CHECKPOINTS,
    JOB,
    LOCK,
    METRICS,
    RUNS,
    create_numbered,
    make_run_folder,
    read_slurm_job,
)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run_folder(folder: Path | None, name: str, job: str | None = None) -> Iterator[Path]:
    """Create or reopen a run's folder, and lock it.

    If the block raises before anything was logged or saved, its files are removed, and so is the folder
    if it was new: a refused run leaves nothing behind.

    Args:
        folder: The folder; `None` to create a numbered one.
        name: The run's name, for a new folder.
        job: Id of the current Slurm job.

    Yields:
        The folder.

    Raises:
        UserError: The folder cannot be created, or another process has locked it.
    """
    folder, missing = create_run_folder(folder, name)
    with lock_run_folder(folder, job):
        names = {path.name for path in folder.iterdir()}
        was_unused = names <= {LOCK, CHECKPOINTS} and not _is_used(folder)
        try:
            yield folder
        except BaseException:
            if was_unused and not _is_used(folder):
                _empty(folder)
                remove_empty(missing)
            raise


def create_run_folder(folder: Path | None, name: str) -> tuple[Path, list[Path]]:
    """Create a run's folder unless it exists.

    Args:
        folder: The folder; `None` to create a numbered one.
        name: The run's name, for a new folder.

    Returns:
        The folder, and those of its path that did not exist before.

    Raises:
        UserError: The folder cannot be created.
    """
    wanted = RUNS if folder is None else folder
    missing = [path for path in (wanted, *wanted.parents) if not path.exists()]
    if folder is None:
        folder = create_numbered(name)
        return folder, [folder, *missing]
    make_run_folder(folder, exist_ok=True)
    return folder, missing


def _is_used(folder: Path) -> bool:
    return (folder / METRICS).exists() or any((folder / CHECKPOINTS).glob("*"))


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():  # it may have been deleted meanwhile
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, unless another run was created in them meanwhile."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def lock_run_folder(folder: Path, job: str | None = None) -> Iterator[None]:
    """Lock a run's folder for the duration of a block.

    Args:
        folder: An existing folder.
        job: Id of the current Slurm job.

    Raises:
        UserError: Another process has locked the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(folder / LOCK))
        except AlreadyLockedError:
            raise UserError(
                f"{folder} is in use: another process is training in it; wait for it, or name another "
                "folder with --run.dir"
            ) from None
        except LocksUnsupportedError as error:
            _check_slurm_job(folder, job, error)
        except OSError as error:
            raise UserError(
                f"run.dir {folder} cannot be written ({error.strerror}); make it writable, or name "
                "another folder"
            ) from error
        yield


def _check_slurm_job(folder: Path, job: str | None, error: Exception) -> None:
    """Refuse a folder that another Slurm job has used, on a file system without locks."""
    owner = read_slurm_job(folder)
    if owner is not None and owner != job:
        raise UserError(
            f"{folder} holds a run of Slurm job {owner}, which may still be training: its file system "
            f"has no locks; if that job has ended, remove {folder / JOB}"
        ) from error
    logger.warning(
        "%s cannot be locked (%s): make sure that no other process trains in it", folder, error
    )
