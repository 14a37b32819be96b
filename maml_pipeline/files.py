"""Atomic file writes, and folders that the user names."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from maml_pipeline.errors import UserError

UNFINISHED = ".unfinished"
"""Suffix of a file while it is written; only a killed process leaves one behind."""


def make_folder(path: Path, key: str) -> None:
    """Create a folder and its parents, unless it exists.

    Args:
        path: Its path.
        key: Key or option with which the user named it, for the message.

    Raises:
        UserError: It cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{key} {path} cannot be created ({error.strerror}); name a writable folder"
        ) from error


def expand_home(path: Path, key: str) -> Path:
    """Expand a leading `~`, which a shell leaves alone in `--key=~/...` and in a config.

    Args:
        path: As the user wrote it.
        key: Key or option with which the user named it, for the message.

    Raises:
        UserError: The home folder does not exist.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{key} {path} begins with a home folder that does not exist") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers, a kill or a power cut never leave half of it.

    Args:
        path: Path of the file; an existing file is replaced.
        content: Text, written as UTF-8, or bytes.

    Raises:
        OSError: Writing failed. Its `filename` is the path, and an existing file is unchanged.
    """
    with open_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its path only if the block succeeds.

    Args:
        path: Path of the file; an existing file is replaced.

    Yields:
        The file, opened for writing bytes.

    Raises:
        OSError: Writing failed. Its `filename` is the path, and an existing file is unchanged.
    """
    # A random name, because two processes may write the same file at the same time.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:  # the error of a failed write names no file
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed processes from a folder and its subfolders.

    Args:
        folder: Must not be written to by another process.
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
