"""The Omniglot drawings: found or downloaded, scaled to 28x28, packed into one array on disk."""

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from platformdirs import user_cache_path
from tqdm import tqdm

from maml_pipeline.errors import UserError
from maml_pipeline.files import expanded

CHARACTERS, DRAWINGS, SIDE = 1623, 20, 28
HALVES = ("images_background", "images_evaluation")
ROOT_VARIABLE = "MAML_OMNIGLOT_ROOT"
OFFLINE_VARIABLE = "MAML_OFFLINE"


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
    try:
        # Reading an .npz verifies the checksum, so a damaged cache is found out and packed anew.
        with cache.open("rb") as file, np.load(file) as archive:
            images: np.ndarray = archive["images"]
        return images
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        images = pack(halves)
        write_atomically(cache, images)
        return images


def find_images(root: Path | None = None, cache_dir: Path | None = None) -> tuple[list[Path], Path]:
    """Return the two halves, downloaded where there are none, and where their cache is or will be.

    Args:
        root: As in `Omniglot`.
        cache_dir: As in `Omniglot`.

    Raises:
        UserError: The data are missing and cannot be downloaded.
    """
    variable = Path(os.environ.get(ROOT_VARIABLE) or "data/omniglot")
    root = expanded(root, "root") if root else expanded(variable, ROOT_VARIABLE)
    halves = find_halves(root) or download_halves(root)
    cache_dir = expanded(cache_dir, "cache_dir") if cache_dir else user_cache_path("maml_pipeline")
    return halves, cache_dir / f"omniglot-{fingerprint(halves)}.npz"


def find_halves(root: Path) -> list[Path] | None:
    """Return the two halves below `root`, each a folder or a zip, or `None` where there is neither."""
    for folder in (root, root / "omniglot-py"):
        found = [
            next((path for path in (folder / half, folder / f"{half}.zip") if path.exists()), None)
            for half in HALVES
        ]
        halves = [path for path in found if path is not None]
        if len(halves) == len(HALVES):
            return halves
        if halves:
            missing = HALVES[found.index(None)]
            raise UserError(f"{folder} has {halves[0].name} but neither {missing} nor {missing}.zip")
    return None


def download_halves(root: Path) -> list[Path]:
    """Download Omniglot into `root` through torchvision and return its two halves."""
    if os.environ.get(OFFLINE_VARIABLE):
        raise UserError(
            f"root {root} holds no Omniglot, and nothing is downloaded in a Slurm job, nor where "
            f"{OFFLINE_VARIABLE} is set; run `maml prepare omniglot` first, or name its folder in "
            f"{ROOT_VARIABLE}"
        )
    from torchvision.datasets import Omniglot  # late: torchvision takes a while to import

    try:
        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"root {root} holds no Omniglot and the download failed ({error}). Put {HALVES[0]}.zip "
            f"and {HALVES[1]}.zip there, or name their folder in {ROOT_VARIABLE}"
        ) from error
    return find_halves(root) or []


def fingerprint(halves: list[Path]) -> str:
    """Return a short name for these very files, so that other data never meet a stale cache."""
    identity = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in halves]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def pack(halves: list[Path]) -> np.ndarray:
    """Decode every drawing of both halves into one uint8 array `(1623, 20, 28, 28)`."""
    images = np.empty((CHARACTERS, DRAWINGS, SIDE, SIDE), dtype=np.uint8)
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
    """Iterate over a half's drawings in the order of their paths, each with how to read it."""
    if half.is_dir():
        for path in sorted(half.glob("*/*/*.png")):
            yield str(path.relative_to(half)), path.read_bytes
        return
    try:
        with zipfile.ZipFile(half) as archive:
            for name in sorted(archive.namelist(), key=lambda name: name.split("/")):
                if not name.endswith(".png"):
                    continue
                yield name, lambda name=name: archive.read(name)  # type: ignore[misc]
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{half} is truncated or damaged ({error}): fetch it again") from error


def decode(name: str, read: Callable[[], bytes]) -> np.ndarray:
    """Decode one drawing to uint8 `(28, 28)`, strokes white on black."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except OSError as error:
        raise UserError(f"{name} is truncated or damaged ({error}): fetch it again") from error
    return 255 - np.asarray(small)


def write_atomically(cache: Path, images: np.ndarray) -> None:
    """Write the cache under another name and rename it, so that nobody ever reads half of it."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".npz", delete=False) as file:
            try:
                np.savez(file, images=images)
                os.replace(file.name, cache)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cache_dir {cache.parent} cannot be written ({error.strerror})") from error
