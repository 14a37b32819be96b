"""The Omniglot drawings: found or downloaded, decoded, scaled to 28x28."""

import hashlib
import io
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.client import HTTPException
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image
from platformdirs import user_cache_path
from tqdm import tqdm

from maml_pipeline.environment import OFFLINE, OMNIGLOT_ROOT
from maml_pipeline.errors import UserError
from maml_pipeline.files import expanded, make_folder
from maml_pipeline.tasks.omniglot_cache import read_cache, remove_new_folders_on_error, write_cache

CHARACTERS, DRAWINGS, SIDE = 1623, 20, 28
SHAPE = (CHARACTERS, DRAWINGS, SIDE, SIDE)
HALVES = ("images_background", "images_evaluation")
DRAWING = re.compile(r"\d{4}_\d{2}\.png")
LITTER = re.compile(r"\..*|__MACOSX")
"""Names of what operating systems add to folders and archives."""


def load_images(root: Path | None = None, cache_dir: Path | None = None) -> np.ndarray:
    """Return every drawing, from the packed cache where there is a sound one.

    Args:
        root: As in `Omniglot`.
        cache_dir: As in `Omniglot`.

    Returns:
        uint8 `(1623, 20, 28, 28)`: characters in the order of their paths, background half first;
        strokes 255 on 0.

    Raises:
        UserError: The data are missing, cannot be downloaded, or are incomplete or damaged.
    """
    halves, cache = find_images(root, cache_dir)
    images = read_cache(cache, SHAPE)
    if images is None:
        images = pack(halves)
        write_cache(cache, images)
    return images


def find_images(root: Path | None = None, cache_dir: Path | None = None) -> tuple[list[Path], Path]:
    """Return the two halves, downloaded where there are none, and where their cache is or will be.

    Args:
        root: As in `Omniglot`.
        cache_dir: As in `Omniglot`.

    Raises:
        UserError: The data are missing and cannot be downloaded.
    """
    root = expanded(root, "root") if root else expanded(OMNIGLOT_ROOT.get(), OMNIGLOT_ROOT.name)
    halves = find_halves(root) or download_halves(root)
    cache_dir = expanded(cache_dir, "cache_dir") if cache_dir else user_cache_path("maml_pipeline")
    return halves, cache_dir / f"omniglot-{fingerprint(halves)}.npz"


def find_halves(root: Path) -> list[Path] | None:
    """Return the two halves below `root`, each a folder or a zip, or `None` where there is neither."""
    for folder in (root, root / "omniglot-py"):
        found = [_find_half(folder, half) for half in HALVES]
        halves = [path for path in found if path is not None]
        if len(halves) == len(HALVES):
            return halves
        if halves:
            missing = HALVES[found.index(None)]
            raise UserError(f"{folder} has {halves[0].name} but neither {missing} nor {missing}.zip")
    return None


def _find_half(folder: Path, half: str) -> Path | None:
    unpacked, archive = folder / half, folder / f"{half}.zip"
    if unpacked.is_dir() and any(unpacked.iterdir()):
        # Unpacked into a folder of its name, as some programs do, it lies one folder deeper.
        while (unpacked / half).is_dir():
            unpacked /= half
        return unpacked
    return archive if archive.exists() else None


def download_halves(root: Path) -> list[Path]:
    """Download Omniglot into `root` through torchvision and return its two halves."""
    if OFFLINE.get():
        raise UserError(
            f"root {root} holds no Omniglot, and nothing is downloaded in a Slurm job, nor where "
            f"{OFFLINE.name} is set; run `maml prepare omniglot` first, or name its folder in "
            f"{OMNIGLOT_ROOT.name}"
        )
    from torchvision.datasets import Omniglot  # late: torchvision takes a while to import

    with remove_new_folders_on_error(root):
        make_folder(root, "root")
        try:
            # Beside the place where it is looked for, so that half a download is never found.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as unfinished:
                for background in (True, False):
                    Omniglot(unfinished, background=background, download=True)
                if not find_halves(root):  # another process may have been faster
                    Path(unfinished, "omniglot-py").rename(root / "omniglot-py")
        except (OSError, RuntimeError, HTTPException, zipfile.BadZipFile) as error:
            raise UserError(
                f"root {root} holds no Omniglot and the download failed ({error}). Put {HALVES[0]}.zip "
                f"and {HALVES[1]}.zip there, or name their folder in {OMNIGLOT_ROOT.name}"
            ) from error
    return find_halves(root) or []


def fingerprint(halves: list[Path]) -> str:
    """Return a short name for these very files, so that other data never meet a stale cache."""
    identity = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in halves]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def pack(halves: list[Path]) -> np.ndarray:
    """Decode every drawing of both halves into one uint8 array `(1623, 20, 28, 28)`."""
    images = np.empty(SHAPE, dtype=np.uint8)
    characters = 0
    with tqdm(total=CHARACTERS, desc="Packing Omniglot", unit=" characters", disable=None) as progress:
        for half in halves:
            for name, group in groupby(drawings(half), key=lambda drawing: Path(drawing[0]).parent):
                character = [decode(f"{half}: {path}", read) for path, read in group]
                if len(character) != DRAWINGS:
                    raise UserError(f"{half}: {name} has {len(character)} drawings, not {DRAWINGS}")
                if characters < CHARACTERS:
                    images[characters] = character
                characters += 1
                progress.update()
    if characters != CHARACTERS:
        places = " and ".join(map(str, halves))
        raise UserError(f"{places} hold {characters} characters, not {CHARACTERS}: fetch them again")
    return images


def drawings(half: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Iterate over a half's drawings in the order of their paths, and nothing else that lies there.

    Yields:
        `<alphabet>/<character>/<drawing>.png`, and how to read it.
    """
    if half.is_dir():
        for path in sorted(half.glob("*/*/*.png")):
            if _is_drawing(path.relative_to(half).parts):
                yield str(path.relative_to(half)), path.read_bytes
        return
    try:
        with zipfile.ZipFile(half) as archive:
            # Windows may have packed it with backslashes. Read by entry and not by name, of which a
            # damaged archive may have two.
            entries = [(re.split(r"[/\\]", entry.filename), entry) for entry in archive.infolist()]
            found = [(parts[-3:], entry) for parts, entry in entries if _is_drawing(parts)]
            for parts, entry in sorted(found, key=itemgetter(0)):
                yield "/".join(parts), partial(archive.read, entry)
    except UserError:
        raise
    except Exception as error:  # what a ZIP reader raises on damaged headers is of many kinds
        raise UserError(f"{half} is truncated or damaged ({error}): fetch it again") from error


def _is_drawing(parts: Sequence[str]) -> bool:
    return (
        len(parts) >= 3
        and DRAWING.fullmatch(parts[-1]) is not None
        and not any(LITTER.fullmatch(part) for part in parts)
    )


def decode(name: str, read: Callable[[], bytes]) -> np.ndarray:
    """Decode one drawing to uint8 `(28, 28)`, strokes white on black."""
    try:
        content = read()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksums, which decoding does not look at
        with Image.open(io.BytesIO(content)) as image:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Exception as error:  # from a damaged zip entry, or a damaged picture: of many kinds
        raise UserError(f"{name} is truncated or damaged ({error}): fetch it again") from error
    drawing = 255 - np.asarray(small)
    if not drawing.any():
        raise UserError(f"{name} is blank: fetch it again")
    return drawing
