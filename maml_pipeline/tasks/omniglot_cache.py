"""Cache the decoded Omniglot drawings in one file with a checksum."""

import contextlib
import io
import time
from pathlib import Path

import numpy as np

from maml_pipeline.checksum import add_checksum, has_valid_checksum
from maml_pipeline.errors import UserError
from maml_pipeline.files import make_folder, remove_new_folders_on_error, write_atomically

SECONDS_TO_WRITE = 3600
"""An older unfinished file was left by a killed process."""


def read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read the drawings.

    Args:
        cache: A file written by `write_cache`.
        shape: Expected shape.

    Returns:
        uint8 array of this shape; `None` if the file is missing, damaged or something else.
    """
    try:
        content = cache.read_bytes()
        if not has_valid_checksum(content):
            return None
        with np.load(io.BytesIO(content)) as archive:
            images: np.ndarray = archive["images"]
    except (OSError, KeyError, ValueError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 and images.any() else None


def write_cache(cache: Path, images: np.ndarray) -> None:
    """Write the drawings atomically, and remove unfinished files left by killed processes.

    Args:
        cache: The file; its folder is created if it is missing.
        images: uint8 array of any shape.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    content = io.BytesIO()
    np.savez(content, images=images)
    with remove_new_folders_on_error(cache.parent):
        make_folder(cache.parent, "cache_dir")
        try:
            _remove_leftovers(cache.parent)
            write_atomically(cache, add_checksum(content.getvalue()))
        except OSError as error:
            raise UserError(f"cache_dir {cache.parent} cannot be written ({error.strerror})") from error


def _remove_leftovers(folder: Path) -> None:
    """Remove old unfinished files of `write_atomically` and of earlier versions of this package."""
    for path in [*folder.glob(".omniglot-*"), *folder.glob("tmp????????.npz")]:
        with contextlib.suppress(OSError):  # another process may have removed it
            is_old = time.time() - path.stat().st_mtime > SECONDS_TO_WRITE
            if is_old and (path.name.startswith(".") or _is_unfinished_cache(path)):
                path.unlink()


def _is_unfinished_cache(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(100)
    return beginning[30:].startswith(b"images.npy") or not beginning
