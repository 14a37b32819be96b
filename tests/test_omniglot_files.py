"""Omniglot's files: every layout is read, damage is reported, a failed download leaves nothing."""

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.omniglot_download import HALVES, download_halves, find_halves
from maml_pipeline.tasks.omniglot_images import cache_path, decode, iterate_drawings, load_images


@pytest.mark.exhaustive
def test_zips_folders_and_torchvision_layout_give_the_same_images(
    synthetic_omniglot: Path, tmp_path: Path
) -> None:
    packed = load_images(synthetic_omniglot, tmp_path / "cache").images
    assert packed.shape == (1623 * 20, 1, 28, 28) and packed.dtype == np.uint8
    assert packed.max() > 100 and packed.mean() < 60  # white strokes on black
    for half in synthetic_omniglot.iterdir():
        with zipfile.ZipFile(half) as archive:
            archive.extractall(tmp_path / "unpacked" / "omniglot-py")
    for root in (tmp_path / "unpacked", tmp_path / "unpacked" / "omniglot-py"):
        assert np.array_equal(load_images(root, tmp_path / "cache").images, packed)


@pytest.mark.exhaustive
def test_missing_and_truncated_data_are_reported(synthetic_omniglot: Path, tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    shutil.copytree(synthetic_omniglot, root)
    evaluation = root / "images_evaluation.zip"
    intact = evaluation.read_bytes()

    evaluation.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(UserError, match=r"images_evaluation.zip is truncated or damaged"):
        load_images(root, cache)

    evaluation.unlink()
    with pytest.raises(UserError, match=r"has images_background.zip but neither images_evaluation"):
        load_images(root, cache)

    with zipfile.ZipFile(evaluation, "w") as archive:
        archive.writestr("images_evaluation/A/character01/0000_01.png", b"not an image")
    with pytest.raises(UserError, match=r"0000_01.png is truncated or damaged"):
        load_images(root, cache)
    assert not cache.exists()


STRAY_FILES = ("._0709_01.png", ".DS_Store", "Thumbs.db", "desktop.ini", "0001_01 (1).png")


NAMES: dict[str, Callable[[str], str]] = {
    "unchanged": lambda name: name,
    "doubly nested": lambda name: f"{name.split('/')[0]}/{name}",
    "without the half's folder": lambda name: name.split("/", 1)[1],
    "with backslashes": lambda name: name.replace("/", "\\"),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_stray_files_and_other_folders_in_a_zip_are_ignored(
    compressed: tuple[Path, np.ndarray], tmp_path: Path, name: Callable[[str], str]
) -> None:
    half, images = compressed
    with zipfile.ZipFile(half) as archive, zipfile.ZipFile(tmp_path / half.name, "w") as other:
        for entry in archive.namelist():
            folder, file = entry.rsplit("/", 1)
            other.writestr(name(entry), archive.read(entry))
            for stray in (f"{folder}/._{file}", entry):
                other.writestr(f"__MACOSX/{name(stray)}", b"no drawing")
        for stray in STRAY_FILES:
            other.writestr(name(f"{folder}/{stray}"), b"no drawing")
            other.writestr(stray, b"no drawing")
    assert np.array_equal(decoded(tmp_path / half.name), images)


def test_stray_files_and_nested_folders_are_ignored(
    compressed: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    archive, images = compressed
    for half in HALVES:
        nested = tmp_path / half / half / HALVES[0]
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(tmp_path / half / half)
        nested.rename(tmp_path / half / half / half) if half != HALVES[0] else None
        (tmp_path / half / "__MACOSX" / half).mkdir(parents=True)
        for folder in (tmp_path / half, tmp_path / half / half / half / "A" / "character01"):
            for stray in STRAY_FILES:
                (folder / stray).write_bytes(b"no drawing")
    halves = find_halves(tmp_path)
    assert halves == [tmp_path / half / half / half for half in HALVES]
    for folder in halves:
        assert np.array_equal(decoded(folder), images)


def test_a_cache_belongs_to_the_drawings_of_unpacked_folders(
    compressed: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    with zipfile.ZipFile(compressed[0]) as archive:
        archive.extractall(tmp_path)
    halves = [tmp_path / HALVES[0], compressed[0]]
    character = tmp_path / HALVES[0] / "A" / "character01"
    drawings = sorted(character.iterdir())
    first = cache_path(halves)
    (character / STRAY_FILES[0]).touch()
    assert cache_path(halves) == first

    before = drawings[3].stat()
    content = bytes(reversed(drawings[3].read_bytes()))
    changes: list[Callable[[], object]] = [
        lambda: drawings[3].write_bytes(content),
        lambda: os.utime(drawings[3], ns=(before.st_atime_ns, before.st_mtime_ns + 1)),
        lambda: drawings[4].write_bytes(content + b"0"),
        lambda: drawings[5].unlink(),
        lambda: drawings[6].rename(character / "0001_50.png"),
    ]
    names = {first}
    for change in changes:
        change()
        names.add(cache_path(halves))
    assert len(names) == 1 + len(changes)


def test_an_empty_folder_is_ignored(compressed: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    archives = [tmp_path / f"{half}.zip" for half in HALVES]
    for archive in archives:
        shutil.copy(compressed[0], archive)
    (tmp_path / HALVES[0]).mkdir()
    assert find_halves(tmp_path) == archives


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Return a zip with one character, and its decoded drawings."""
    path = tmp_path_factory.mktemp("compressed") / "images_background.zip"
    random = np.random.default_rng(1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for drawing in range(20):
            buffer = io.BytesIO()
            Image.fromarray(random.random((105, 105)) > 0.1).save(buffer, "PNG")
            archive.writestr(f"{HALVES[0]}/A/character01/0001_{drawing:02}.png", buffer.getvalue())
    return path, decoded(path)


def decoded(half: Path) -> np.ndarray:
    return np.stack([decode(name, read) for name, read in iterate_drawings(half)])


def decoded_or_refused(half: Path) -> np.ndarray | str:
    try:
        return decoded(half)
    except UserError as error:
        return str(error)


def test_a_flipped_bit_in_a_zip_is_a_one_line_error_or_harmless(
    compressed: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    intact, images = compressed[0].read_bytes(), compressed[1]
    random, half = np.random.default_rng(2), tmp_path / "images_background.zip"
    first_header, directory = [*range(120)], [*range(intact.index(b"PK\1\2"), len(intact))]
    named = 0
    for place in [
        *first_header,
        *random.choice(directory, 300),
        *random.integers(len(intact), size=300),
    ]:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << int(random.integers(8))
        half.write_bytes(damaged)
        found = decoded_or_refused(half)
        if isinstance(found, str):
            assert "truncated or damaged" in found and len(found.splitlines()) == 1
            named += 1
        else:
            # Metadata such as dates. `decode_all` detects a missing drawing by counting.
            assert len(found) < len(images) or np.array_equal(found, images), place
    assert named > 300


def test_a_flipped_bit_in_an_image_is_a_one_line_error_or_harmless(
    compressed: tuple[Path, np.ndarray],
) -> None:
    with zipfile.ZipFile(compressed[0]) as archive:
        intact = archive.read(archive.namelist()[0])
    named = 0
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << (place % 8)
        try:
            assert np.array_equal(decode("an image", partial(bytes, damaged)), compressed[1][0])
        except UserError:
            named += 1
    assert named >= len(intact) - 8  # except in two checksums, which may be damaged themselves


def test_a_blank_drawing_is_reported() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((105, 105), dtype=bool)).save(buffer, "PNG")
    with pytest.raises(UserError, match="an image is blank"):
        decode("an image", buffer.getvalue)


def test_a_failed_download_says_what_to_do_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, folder: str, **__: object) -> None:
        Path(folder).mkdir()
        Path(folder, "images_background.zip").write_bytes(b"half a")
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", refuse)
    for root in (tmp_path / "new" / "empty", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"download failed .*no route.*MAML_OMNIGLOT_ROOT"):
            load_images(root, tmp_path / "cache" / "deep")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_download_is_found(
    compressed: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(root: str, background: bool, download: bool) -> None:
        folder = Path(root, "omniglot-py")
        folder.mkdir(exist_ok=True)
        shutil.copy(compressed[0], folder / f"{HALVES[not background]}.zip")

    monkeypatch.setattr("torchvision.datasets.Omniglot", fetch)
    root = tmp_path / "data" / "omniglot"
    (tmp_path / "data" / "omniglot" / "omniglot-py").mkdir(
        parents=True
    )  # left empty by an earlier attempt
    halves = download_halves(root)
    assert halves == [root / "omniglot-py" / f"{half}.zip" for half in HALVES]
    assert [path.name for path in root.iterdir()] == ["omniglot-py"]
