"""Omniglot: the decoded images, the cache, the split, and the episodes."""

import io
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_pipeline import TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Omniglot
from maml_pipeline.tasks.omniglot import SPLIT_SIZES, split_characters
from maml_pipeline.tasks.omniglot_cache import SECONDS_TO_WRITE, read_cache, write_cache
from maml_pipeline.tasks.omniglot_download import HALVES, download_halves, find_halves
from maml_pipeline.tasks.omniglot_images import SHAPE, decode, iterate_drawings, load_images
from maml_pipeline.tasks.task import SPLITS


@pytest.fixture(scope="module")
def omniglot(synthetic_omniglot: Path, synthetic_cache: Path) -> Omniglot:
    tasks = Omniglot(root=synthetic_omniglot, cache_dir=synthetic_cache)
    # Images that encode their character (two bytes) and drawing in one corner.
    images = np.zeros((1623, 20, 28, 28), dtype=np.uint8)
    images[:, :, 0, 0] = (np.arange(1623) // 256)[:, None]
    images[:, :, 0, 1] = (np.arange(1623) % 256)[:, None]
    images[:, :, 0, 2] = np.arange(20) + 1
    tasks.images = images
    return tasks


def identify(image: torch.Tensor) -> tuple[int, int, int]:
    """Return the character, drawing and quarter turns encoded in an image."""
    for turns in range(4):
        corner = torch.rot90(image[0] * 255, -turns, (0, 1)).round().long()[0, :3].tolist()
        if corner[2]:
            return corner[0] * 256 + corner[1], corner[2] - 1, turns
    raise AssertionError("no corner encodes a drawing")


@pytest.mark.parametrize("split", SPLITS)
def test_an_episode_contains_distinct_classes_and_drawings_of_its_split(
    omniglot: Omniglot, split: str
) -> None:
    omniglot = make(omniglot, ways=20, shots=2, query_shots=3)
    turns_seen = set()
    for index in range(20):
        task = omniglot.task(0, split, index)  # type: ignore[arg-type]
        assert task.support_x.shape == (40, 1, 28, 28) and task.query_x.shape == (60, 1, 28, 28)
        x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
        classes: dict[int, set[tuple[int, int]]] = {}
        drawings: dict[int, list[int]] = {}
        for image, label in zip(x, y.tolist(), strict=True):
            character, drawing, turns = identify(image)
            assert character in split_characters(split)  # type: ignore[arg-type]
            classes.setdefault(label, set()).add((character, turns))
            drawings.setdefault(label, []).append(drawing)
            turns_seen.add(turns)
        assert all(len(of_label) == 1 for of_label in classes.values())
        assert len(set.union(*classes.values())) == 20
        assert all(len(set(d)) == len(d) == 5 for d in drawings.values())
    assert turns_seen == {0, 1, 2, 3}


def make(like: Omniglot, **settings: object) -> Omniglot:
    tasks = Omniglot(root=like.root, cache_dir=like.cache_dir, **settings)  # type: ignore[arg-type]
    tasks.images = like.images
    return tasks


def test_a_split_that_is_not_rotated_has_upright_characters(omniglot: Omniglot) -> None:
    tasks = make(omniglot, rotated_splits=["train"])
    turns = {identify(image)[2] for i in range(50) for image in tasks.task(0, "test", i).query_x}
    assert turns == {0}


def test_a_batch_equals_its_stacked_tasks(omniglot: Omniglot) -> None:
    batch = omniglot.batch(1, "train", [4, 2])
    stacked = TaskBatch.stack([omniglot.task(1, "train", 4), omniglot.task(1, "train", 2)])
    assert all(torch.equal(a, b) for a, b in zip(batch, stacked, strict=True))
    assert batch.support_x.dtype == torch.float32 and batch.support_y.dtype == torch.int64


def test_the_split_is_fixed_and_covers_every_character_once() -> None:
    characters = [split_characters(split) for split in SPLITS]
    assert [len(c) for c in characters] == [1100, 100, 423] == list(SPLIT_SIZES.values())
    assert sorted(np.concatenate(characters)) == list(range(1623))
    # Another order would be a different benchmark.
    assert [c[:3].tolist() for c in characters] == PINNED_CHARACTERS


PINNED_CHARACTERS = [[1035, 1472, 354], [445, 1296, 199], [1045, 1481, 1465]]


@pytest.mark.exhaustive
def test_zips_folders_and_torchvision_layout_give_the_same_images(
    synthetic_omniglot: Path, tmp_path: Path
) -> None:
    packed = load_images(synthetic_omniglot, tmp_path / "cache")
    assert packed.shape == (1623, 20, 28, 28) and packed.dtype == np.uint8
    assert packed.max() > 100 and packed.mean() < 60  # white strokes on black
    for half in synthetic_omniglot.iterdir():
        with zipfile.ZipFile(half) as archive:
            archive.extractall(tmp_path / "unpacked" / "omniglot-py")
    for root in (tmp_path / "unpacked", tmp_path / "unpacked" / "omniglot-py"):
        assert np.array_equal(load_images(root, tmp_path / "cache"), packed)


def test_a_valid_cache_is_used_and_a_damaged_one_rebuilt(
    synthetic_omniglot: Path, synthetic_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(synthetic_cache, tmp_path, dirs_exist_ok=True)
    packed = load_images(synthetic_omniglot, tmp_path)
    (cache,) = tmp_path.iterdir()
    intact = cache.read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr("maml_pipeline.tasks.omniglot_images.decode_all", None)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)

    packings: list[object] = []

    def pack_again(halves: object) -> np.ndarray:
        packings.append(halves)
        return packed

    monkeypatch.setattr("maml_pipeline.tasks.omniglot_images.decode_all", pack_again)
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
    for count, damaged in enumerate((b"", intact[:1000], intact[:-100], flipped), start=1):
        cache.write_bytes(damaged)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count


def test_any_damage_to_a_cache_is_detected(tmp_path: Path) -> None:
    cache = tmp_path / "omniglot-0.npz"
    random = np.random.default_rng(0)
    packed = random.integers(256, size=(3, 20, 28, 28), dtype=np.uint8)
    write_cache(cache, packed)
    intact = cache.read_bytes()
    used = read_cache(cache, packed.shape)
    assert used is not None and np.array_equal(used, packed)

    ends = [*range(300), *range(len(intact) - 300, len(intact))]  # every byte of the headers
    for place in [*ends, *random.integers(len(intact), size=400)]:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << int(random.integers(8))
        cache.write_bytes(damaged)
        assert read_cache(cache, packed.shape) is None, place
    for length in (0, 1, 1000, len(intact) - 1, len(intact) - 100):
        cache.write_bytes(intact[:length])
        assert read_cache(cache, packed.shape) is None


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1623, 20, 28, 28), dtype=np.uint8),
        np.ones((1623, 20, 28, 27), dtype=np.uint8),
        np.ones((1623, 20, 28, 28), dtype=np.int8),
    ],
    ids=["blank", "wrong shape", "wrong type"],
)
def test_a_cache_with_other_contents_is_not_used(tmp_path: Path, images: np.ndarray) -> None:
    cache = tmp_path / "omniglot-0.npz"
    write_cache(cache, images)
    assert read_cache(cache, SHAPE) is None
    with cache.open("wb") as file:
        np.savez(file, images=images)  # by another program, without a checksum
    assert read_cache(cache, SHAPE) is None
    assert read_cache(tmp_path, SHAPE) is None
    assert read_cache(tmp_path / "nothing", SHAPE) is None


def test_writing_a_cache_removes_files_left_by_killed_processes(tmp_path: Path) -> None:
    ours = ("tmpa1b2c3d4.npz", ".omniglot-0.npz.123", ".omniglot-0.npz.1f3e.unfinished")
    for name in (*ours, ".omniglot-1.npz.124", "tmpstranger.npz", "tmp12345678.npz"):
        content = b"PK\3\4" + bytes(26) + b"images.npy" if name == ours[0] else b"other"
        (tmp_path / name).write_bytes(content)
        age = 0 if "124" in name else 2 * SECONDS_TO_WRITE  # 124 may still be writing
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_cache(tmp_path / "omniglot-0.npz", np.ones((1, 20, 28, 28), dtype=np.uint8))
    kept = {".omniglot-1.npz.124", "tmpstranger.npz", "tmp12345678.npz", "omniglot-0.npz"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.integration
def test_two_processes_can_load_at_the_same_time(synthetic_omniglot: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as processes:
        results = list(processes.map(load_images, [synthetic_omniglot] * 2, [tmp_path] * 2))
    assert np.array_equal(results[0], results[1])
    assert len(list(tmp_path.iterdir())) == 1


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


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir .*file/cache cannot be created"):
        write_cache(tmp_path / "file" / "cache" / "omniglot-0.npz", np.ones(1, dtype=np.uint8))


@pytest.fixture(scope="module")
def real_images(real_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return load_images(real_omniglot, tmp_path_factory.mktemp("cache"))


@pytest.mark.exhaustive
def test_the_real_omniglot_is_complete(real_images: np.ndarray) -> None:
    images = real_images
    assert images.shape == (1623, 20, 28, 28)
    ink = (images > 127).mean(axis=(2, 3))
    assert ink.min() > 0 and ink.max() < 0.5  # not empty, and mostly background
    # Two drawings of one character are byte-identical in every copy of the data set; no others are.
    distinct = np.unique(images.reshape(1623 * 20, -1), axis=0)
    assert len(distinct) == 1623 * 20 - 1


def test_an_image_is_the_drawing_scaled_and_inverted(
    real_omniglot: Path, real_images: np.ndarray
) -> None:
    name = "images_background/Alphabet_of_the_Magi/character01/0709_01.png"
    half = real_omniglot / "images_background.zip"
    if not half.exists():
        pytest.skip("reads the drawing from the zip")
    with zipfile.ZipFile(half) as archive, archive.open(name) as file, Image.open(file) as image:
        drawing = 255 - np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BOX))
    small = real_images[0, 0]
    assert np.corrcoef(small.ravel(), drawing.ravel())[0, 1] > 0.95
