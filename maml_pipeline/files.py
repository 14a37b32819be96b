"""Files that are whole or not there."""

import os
import secrets
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a kill or a power cut never finds half of it.

    Args:
        path: Where to; an earlier file of that name is replaced in one step.
        content: Text, as UTF-8, or bytes.
    """
    # A name of its own, because two processes may write the same file at the same time.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a killed process was writing in a folder, or in the folders in it.

    Args:
        folder: No other process writes in it.
    """
    for pattern in (f".*{UNFINISHED}", f"*/.*{UNFINISHED}"):
        for unfinished in folder.glob(pattern):
            unfinished.unlink(missing_ok=True)
