"""The fingerprint of data sets: it changes with anything that changes their packed images."""

import hashlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.image_sources import Source

SAMPLES = 16
"""Images of each data set that are read."""
MAX_DEPTH = 6
"""Depth of attributes of attributes."""
Seen = dict[int, tuple[int, Any]]
"""By id: when an object was met, and the object."""
GENERIC = ("builtins", "abc", "typing", "torch.utils")
"""Modules whose code decides no pixel."""


def fingerprint(sources: Sequence[Source], size: int, channels: int) -> str:
    """Return a fingerprint of the images that data sets give.

    It depends on the code of each data set's class, on its attributes (arrays by content, files by size
    and modification time), on a few of its images, and on the format of the packed images.

    Args:
        sources: The data sets.
        size: Height and width of the packed images.
        channels: Their channels.

    Returns:
        16 hexadecimal digits.

    Raises:
        UserError: A data set gives different images for the same index.
    """
    digest = hashlib.sha256(repr((size, channels)).encode())
    for source in sources:
        seen: Seen = {}
        for part in _parts((source.prefix, source.dataset), seen, MAX_DEPTH):
            digest.update(part + b"\0")
        for index in np.linspace(0, len(source) - 1, SAMPLES).astype(int).tolist():
            pixels, name = source.item(index, size, channels)
            digest.update(pixels.tobytes() + name.encode(errors="surrogatepass"))  # any folder name
        again, _ = source.item(index, size, channels)
        if not np.array_equal(again, pixels):
            raise UserError(
                f"{source.key} {source.name} gives another image when image {index} is read again; "
                "leave out random transforms: images are packed once"
            )
    return digest.hexdigest()[:16]


def _parts(value: Any, seen: Seen, depth: int) -> Iterator[bytes]:
    """Yield what tells a value from another one, the same in every process."""
    if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic):
        yield repr(value).encode()
        return
    if isinstance(value, str | Path):
        yield os.fsencode(value)
        yield from _file(value)
        return
    if id(value) in seen:
        yield str(seen[id(value)][0]).encode()
        return
    seen[id(value)] = len(seen), value  # kept, because the id of a freed object is used again
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"{value.dtype} {value.shape}".encode()
        yield hashlib.sha256(value.tobytes()).digest()
    elif isinstance(value, ModuleType):
        yield value.__name__.encode()
    elif isinstance(value, FunctionType | type):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        yield _code(value)
    elif depth:
        yield type(value).__qualname__.encode()
        for kind in type(value).__mro__:
            yield _code(kind)
        for part in _contents(value):
            yield from _parts(part, seen, depth - 1)


def _contents(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from pair
    elif isinstance(value, set | frozenset):
        yield from sorted(value, key=repr)
    elif isinstance(value, list | tuple | np.ndarray):
        yield from value
    yield from getattr(value, "__dict__", {}).items()


def _file(path: str | Path) -> Iterator[bytes]:
    if os.sep in str(path) or isinstance(path, Path):
        try:
            found = os.stat(path)
        except (OSError, ValueError):
            return
        if not os.path.isdir(path):
            yield f"{found.st_size} {found.st_mtime_ns}".encode()


@cache
def _code(kind: Any) -> bytes:
    """Return a digest of the source of the module of a class or function, which a user may edit."""
    module = inspect.getmodule(kind)
    if module is None or module.__name__.startswith(GENERIC):
        return b""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).digest()
    except (OSError, TypeError):  # built in, or typed into a notebook
        return bytes(getattr(getattr(kind, "__code__", None), "co_code", b""))
