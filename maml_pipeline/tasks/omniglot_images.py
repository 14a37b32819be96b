"""Decode the Omniglot drawings and scale them to 28x28 pixels."""

import glob
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.image_cache import PackedImages, cache_folder, load_or_pack, write_cache
from maml_pipeline.tasks.omniglot_download import find_or_download

CHARACTERS, DRAWINGS, SIDE = 1623, 20, 28
DRAWING_NAME = re.compile(r"\d{4}_\d{2}\.png")
HIDDEN_NAME = re.compile(r"\..*|__MACOSX")
"""What operating systems add to folders and archives."""


def load_images(root: Path | None = None, cache_dir: Path | None = None) -> PackedImages:
    """Load all drawings, from the cache if it is valid; otherwise decode them and write the cache.

    Args:
        root: Data folder, as in `Omniglot`.
        cache_dir: Cache folder, as in `Omniglot`.

    Returns:
        uint8 `(1623 * 20, 1, 28, 28)`, strokes 255 on 0; characters in the order of their paths, the
        background half first.

    Raises:
        UserError: The data set is missing and cannot be downloaded, is incomplete or damaged, or the
            cache cannot be written.
    """
    halves = find_or_download(root)

    def pack(file: Path) -> None:
        write_cache(file, (CHARACTERS * DRAWINGS, 1, SIDE, SIDE), decode_all(halves))

    return load_or_pack(cache_path(halves, cache_dir), pack)


def cache_path(halves: list[Path], cache_dir: Path | None = None) -> Path:
    """Return the path of the cache file.

    The name depends on the path, size and modification time of both zips, or of every drawing if they
    are unpacked, so that a changed data set never meets a stale cache.

    Args:
        halves: The background and the evaluation half.
        cache_dir: Cache folder, as in `Omniglot`.
    """
    identity = [part for half in halves for part in _identity(half)]
    fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return cache_folder(cache_dir) / f"omniglot-{fingerprint}.npy"


def _identity(half: Path) -> Iterator[tuple[str, int, int]]:
    place = str(half.resolve())
    # Not the folder's own time, which an edited drawing does not change.
    files = [os.path.join(place, name) for name in _drawings(half)] if half.is_dir() else [place]
    for file in files:
        status = os.stat(file)
        yield file, status.st_size, status.st_mtime_ns


def decode_all(halves: list[Path]) -> Iterator[tuple[np.ndarray, str]]:
    """Decode every drawing of both halves.

    Yields:
        1623 * 20 drawings, uint8 `(28, 28)`, each with the number of its character.

    Raises:
        UserError: A drawing is damaged, or the number of drawings or characters is wrong.
    """
    characters = 0
    with tqdm(total=CHARACTERS, desc="Decoding Omniglot", unit=" characters", disable=None) as progress:
        for half in halves:
            for name, group in groupby(
                iterate_drawings(half), key=lambda drawing: Path(drawing[0]).parent
            ):
                character = [decode(f"{half}: {path}", read) for path, read in group]
                if len(character) != DRAWINGS:
                    raise UserError(f"{half}: {name} has {len(character)} drawings, not {DRAWINGS}")
                if characters < CHARACTERS:
                    yield from ((drawing, str(characters)) for drawing in character)
                characters += 1
                progress.update()
    if characters != CHARACTERS:
        places = " and ".join(map(str, halves))
        raise UserError(
            f"{places} contain {characters} characters, not {CHARACTERS}; download them again"
        )


def iterate_drawings(half: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Iterate over a half's drawings in the order of their paths, ignoring all other files.

    Args:
        half: A folder or a zip.

    Yields:
        `<alphabet>/<character>/<drawing>.png`, and a function that reads it.

    Raises:
        UserError: The zip is damaged.
    """
    if half.is_dir():
        for name in _drawings(half):
            yield name, (half / name).read_bytes
        return
    try:
        with zipfile.ZipFile(half) as archive:
            # Zips made on Windows may contain backslashes. Entries are read by position, because a
            # damaged zip may contain a name twice.
            entries = [(re.split(r"[/\\]", entry.filename), entry) for entry in archive.infolist()]
            found = [(parts[-3:], entry) for parts, entry in entries if _is_drawing(parts)]
            for parts, entry in sorted(found, key=itemgetter(0)):
                yield "/".join(parts), partial(archive.read, entry)
    except UserError:
        raise
    except Exception as error:  # a damaged zip raises errors of many types
        raise UserError(f"{half} is truncated or damaged ({error}); download it again") from error


def decode(name: str, read: Callable[[], bytes]) -> np.ndarray:
    """Decode one drawing to uint8 `(28, 28)`, strokes white on black.

    Args:
        name: The drawing's name, for error messages.
        read: Returns the content of the PNG file.

    Raises:
        UserError: The drawing is damaged or blank.
    """
    try:
        content = read()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksums, which decoding ignores
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Exception as error:  # a damaged zip entry or image raises errors of many types
        raise UserError(f"{name} is truncated or damaged ({error}); download it again") from error
    drawing = 255 - np.asarray(small)
    if not drawing.any():
        raise UserError(f"{name} is blank; download it again")
    return drawing


def _drawings(folder: Path) -> list[str]:
    """Return `<alphabet>/<character>/<drawing>.png` of each drawing in a folder, in their order."""
    # Not `Path.glob`, which is slow: every start lists the drawings, also with a valid cache.
    found = (name.split(os.sep) for name in glob.iglob("*/*/*.png", root_dir=folder))
    return ["/".join(parts) for parts in sorted(filter(_is_drawing, found))]


def _is_drawing(parts: Sequence[str]) -> bool:
    return (
        len(parts) >= 3
        and DRAWING_NAME.fullmatch(parts[-1]) is not None
        and not any(HIDDEN_NAME.fullmatch(part) for part in parts)
    )
