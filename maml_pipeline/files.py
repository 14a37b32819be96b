"""Files that are whole or not there."""

import os
from pathlib import Path

from maml_pipeline.errors import UserError


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, a kill or a power cut never finds half of it.

    Args:
        path: Where; what stood there before is replaced at once.
        content: Text, as UTF-8, or bytes.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
