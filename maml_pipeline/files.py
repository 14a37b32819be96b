"""Files that are whole or not there."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from maml_pipeline.errors import UserError

UNFINISHED = ".unfinished"
"""What the name of a file ends in while it is written; only a process that was killed leaves one."""


def make_folder(path: Path, key: str) -> None:
    """Make a folder, and those that it lies in, unless it is there.

    Args:
        path: Its path.
        key: What a person named it by, for the message.

    Raises:
        UserError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key} {path} cannot be made ({error.strerror}); name a writable folder"
        ) from error


def expand_home(path: Path, key: str) -> Path:
    """Expand a leading `~`, which a shell leaves alone in `--key=~/...` and in a config.

    Args:
        path: As the user wrote it.
        key: What they named it by, for the message.

    Raises:
        UserError: There is no such home folder.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} {path} begins with a home folder that does not exist") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a kill or a power cut never finds half of it.

    Args:
        path: Where to; an earlier file of that name is replaced in one step.
        content: Text, as UTF-8, or bytes.

    Raises:
        OSError: It cannot be written; its `filename` is the path, and an earlier file is as it was.
    """
    # A name of its own, because two processes may write the same file at the same time.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:  # a failed write does not say of which file
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a killed process was writing in a folder, or in the folders in it.

    Args:
        folder: No other process writes in it.
    """
    for pattern in (f".*{UNFINISHED}", f"*/.*{UNFINISHED}"):
        for unfinished in folder.glob(pattern):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def remove_new_folders_on_error(*folders: Path) -> Iterator[None]:
    """Remove the folders that a failing block has created and left empty, and their new parents."""
    missing = [place for folder in folders for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # not created, or not empty
                place.rmdir()
        raise
