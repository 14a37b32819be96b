"""The open folder of a run: held by the one process that trains in it, and removed if left unused."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from maml_pipeline.errors import UserError
from maml_pipeline.runs.folder import (
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
    """Make a run's folder, or open it again, and hold it.

    Where the block ends with an error before anything was logged or saved, what it left in the folder is
    removed, and the folder with it if it was not there before: whatever the error, a refusal leaves
    nothing behind.

    Args:
        folder: The folder; `None` for a new one.
        name: The run's name, which a new folder is called by.
        job: Id of the Slurm job that this process is of.

    Yields:
        The folder.

    Raises:
        UserError: It cannot be made, or another process holds it.
    """
    wanted = RUNS if folder is None else folder
    missing = [path for path in (wanted, *wanted.parents) if not path.exists()]
    if folder is None:
        folder = create_numbered(name)
        missing = [folder, *missing]
    else:
        make_run_folder(folder, exist_ok=True)
    with lock_run_folder(folder, job):
        names = {path.name for path in folder.iterdir()}
        was_unused = names <= {LOCK, CHECKPOINTS} and not _is_used(folder)
        try:
            yield folder
        except BaseException:
            if was_unused and not _is_used(folder):
                _remove(folder, missing)
            raise


def _is_used(folder: Path) -> bool:
    return (folder / METRICS).exists() or any((folder / CHECKPOINTS).glob("*"))


def _remove(folder: Path, missing: list[Path]) -> None:
    """Empty a folder, and remove it and those above it that were missing before."""
    for path in folder.iterdir() if folder.is_dir() else ():  # it may have been deleted meanwhile
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in missing:
        with contextlib.suppress(OSError):  # by now another run lies there
            path.rmdir()


@contextlib.contextmanager
def lock_run_folder(folder: Path, job: str | None = None) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it when this process ends, however it does.

    The file stays: a lock on a file that somebody removes meanwhile would keep nobody out.

    Args:
        folder: It exists.
        job: Id of the Slurm job that this process is of.

    Raises:
        UserError: Another process holds it, or it cannot be written.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"run.dir {folder} cannot be written ({error.strerror}); make it writable, or name another"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is in use: another process trains in it; wait for it, or name another "
                "folder with --run.dir"
            ) from None
        except OSError as error:
            _check_slurm_job(folder, job, error)
        yield
    finally:
        os.close(descriptor)


def _check_slurm_job(folder: Path, job: str | None, error: OSError) -> None:
    """Go by the Slurm job that a folder names, on a file system without locks."""
    owner = read_slurm_job(folder)
    if owner is not None and owner != job:
        raise UserError(
            f"{folder} holds a run of Slurm job {owner}, and its file system has no locks that would "
            f"tell whether that job still trains; remove {folder / JOB} if it does not"
        ) from error
    logger.warning(
        "%s cannot be locked (%s): make sure that no other process trains in it", folder, error
    )
