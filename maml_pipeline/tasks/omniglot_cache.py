"""The packed Omniglot drawings as one file, which is used only where it is as it was written."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maml_pipeline.checksum import add_checksum, has_valid_checksum
from maml_pipeline.errors import UserError
from maml_pipeline.files import make_folder, write_atomically

SECONDS_TO_WRITE = 3600
"""An unfinished file that is older was left by a process that was killed."""


def read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the packed drawings.

    Args:
        cache: A file that `write_cache` wrote.
        shape: Their shape.

    Returns:
        uint8 of that shape; `None` where there are none, or the file is not as it was written.
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
    """Keep the packed drawings, and remove what processes that were killed have left.

    Raises:
        UserError: The folder cannot be made or written.
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


@contextlib.contextmanager
def remove_new_folders_on_error(*folders: Path) -> Iterator[None]:
    """Remove the folders that a failing block has made and left empty, and those that they lie in."""
    missing = [place for folder in folders for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with contextlib.suppress(OSError):  # not made, or not empty
                place.rmdir()
        raise


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished caches: those of `write_atomically`, and those of earlier versions."""
    for path in [*folder.glob(".omniglot-*"), *folder.glob("tmp????????.npz")]:
        with contextlib.suppress(OSError):  # another process may have been faster
            is_old = time.time() - path.stat().st_mtime > SECONDS_TO_WRITE
            if is_old and (path.name.startswith(".") or _is_unfinished_cache(path)):
                path.unlink()


def _is_unfinished_cache(path: Path) -> bool:
    with path.open("rb") as file:
        beginning = file.read(100)
    return beginning[30:].startswith(b"images.npy") or not beginning
