"""Packed images: all images of a data set in one checksummed file that processes map into memory.

The file is a NumPy array file, which `np.load(file, mmap_mode="r")` reads too, followed by the class of
each image, the names of the classes, and the SHA-256 of all of it.
"""

import contextlib
import hashlib
import json
import mmap
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from platformdirs import user_cache_path

from maml_pipeline.errors import UserError
from maml_pipeline.files import (
    UNFINISHED,
    expand_home,
    make_folder,
    open_atomically,
    remove_new_folders_on_error,
)
from maml_pipeline.locks import LocksUnsupportedError, acquire_lock

SECONDS_TO_WRITE = 3600
"""An unfinished file that was not written to for longer was left by a killed process."""
LOCK = ".lock"
CHECKSUM = b"sha256:"
CHECKSUM_BYTES = len(CHECKSUM) + 64
SPARE_BYTES = 2**20
"""Room on the disk for what is written beside the images."""


@dataclass(frozen=True)
class PackedImages:
    """All images of a data set.

    Sent to another process, images of a file are not copied: that process maps the file itself.

    Args:
        images: uint8 `(N, C, H, W)`.
        labels: The class of each image, int64 `(N,)`: an index into `classes`.
        classes: The name of each class.
        file: The file that the images are in, or `None`.
    """

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: Sequence[str]
    file: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.file is None:
            return PackedImages, (self.images, self.labels, self.classes)
        return _map_again, (self.file,)


def load_or_pack(file: Path, pack: Callable[[Path], None]) -> PackedImages:
    """Load packed images; pack them first if the file is missing or damaged.

    Of several processes that need the file, one packs and the others wait.

    Args:
        file: The file.
        pack: Writes the file with `write_cache`.

    Raises:
        UserError: The folder cannot be created or written to, or `pack` raises it.
    """
    if found := read_cache(file):
        return found
    with remove_new_folders_on_error(file.parent), locked_cache(file.parent):
        found = read_cache(file)  # another process may have written it meanwhile
        if found is None:
            pack(file)
            found = read_cache(file)
    if found is None:
        raise UserError(f"cache_dir {file.parent} holds a damaged file after writing it; check the disk")
    return found


def cache_folder(cache_dir: Path | None) -> Path:
    """Return the folder for caches: the one that the user names, or the user's cache folder."""
    return expand_home(cache_dir, "cache_dir") if cache_dir else user_cache_path("maml_pipeline")


@contextlib.contextmanager
def locked_cache(folder: Path) -> Iterator[None]:
    """Create a cache folder and exclude other processes from it, where its file system can."""
    make_folder(folder, "cache_dir")
    lock = folder / LOCK
    is_new = not lock.exists()
    try:
        descriptor = acquire_lock(lock, wait=True)
    except LocksUnsupportedError:
        yield
        return
    except OSError as error:
        raise _unwritable(folder, error) from error
    with open(descriptor):
        try:
            yield
        except BaseException:
            if is_new and not any(path != lock for path in folder.iterdir()):
                lock.unlink(missing_ok=True)  # so that nothing is left of a failed first attempt
            raise


def read_cache(file: Path, verify: bool = True) -> PackedImages | None:
    """Map packed images into memory.

    Args:
        file: A file written by `write_cache`.
        verify: Whether to read the whole file and compare its checksum.

    Returns:
        The images; `None` if the file is missing, damaged or something else.
    """
    try:
        with file.open("rb") as stream:
            if verify and not _has_valid_checksum(stream):
                return None
            images = _map_array(stream)
            labels = np.load(stream)
            classes = json.loads(np.load(stream).tobytes())
    except (OSError, EOFError, ValueError):
        return None
    return PackedImages(images, labels, classes, file)


def write_cache(
    file: Path,
    shape: tuple[int, int, int, int],
    images: Iterable[tuple[np.ndarray, str]],
    classes: Sequence[str] = (),
) -> None:
    """Write packed images atomically, one after another.

    Args:
        file: The file, in an existing folder. Unfinished files that killed processes have left beside
            it are removed.
        shape: Number of images N, channels, height and width.
        images: N images, uint8 `(C, H, W)`, each with the name of its class.
        classes: Names of classes in their order. Others follow, numbers in numerical order.

    Raises:
        UserError: The disk is full, or the folder cannot be written to.
    """
    size = int(np.prod(shape, dtype=np.int64))
    names: list[str] = []
    try:
        _remove_leftovers(file.parent)
        free = shutil.disk_usage(file.parent).free
        if free < size + SPARE_BYTES:
            raise UserError(
                f"cache_dir {file.parent} has {free / 1e9:.2f} GB free, but the images take "
                f"{size / 1e9:.2f} GB; name a folder on another disk"
            )
        with open_atomically(file) as opened:
            stream: Any = _HashedStream(opened)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for image, name in images:
                stream.write(image.tobytes())
                names.append(name)
            others = sorted({*names} - {*classes}, key=lambda name: (len(name), name))
            numbers = {name: number for number, name in enumerate([*classes, *others])}
            np.save(stream, np.array([numbers[name] for name in names], dtype=np.int64))
            np.save(stream, np.frombuffer(json.dumps([*numbers]).encode(), dtype=np.uint8))
            opened.write(CHECKSUM + stream.sha256.hexdigest().encode())
    except OSError as error:
        raise _unwritable(file.parent, error) from error


class _HashedStream:
    """A file that computes the SHA-256 of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _has_valid_checksum(stream: BinaryIO) -> bool:
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
        body = len(view) - CHECKSUM_BYTES
        if body <= 0:
            return False
        with view[:body] as hashed:
            digest = hashlib.sha256(hashed).hexdigest()
        return view[body:].tobytes() == CHECKSUM + digest.encode()


def _map_array(stream: BinaryIO) -> np.ndarray:
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    array = np.memmap(stream, dtype, "r", stream.tell(), shape)
    stream.seek(array.offset + array.nbytes)
    return array


def _map_again(file: Path) -> PackedImages:
    packed = read_cache(file, verify=False)
    if packed is None:
        raise UserError(f"cache {file} was removed during the run; start it again")
    return packed


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cache_dir {folder} cannot be written ({error.strerror}); name another folder")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > SECONDS_TO_WRITE:
                path.unlink()
