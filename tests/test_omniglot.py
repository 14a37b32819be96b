"""Omniglot: the packed images, the split, and what an episode holds."""

import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_pipeline import TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Omniglot
from maml_pipeline.tasks.omniglot import SPLIT_SIZES, split_characters
from maml_pipeline.tasks.omniglot_images import load_images
from maml_pipeline.tasks.task import SPLITS


@pytest.fixture(scope="module")
def omniglot(synthetic_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> Omniglot:
    tasks = Omniglot(root=synthetic_omniglot, cache_dir=tmp_path_factory.mktemp("cache"))
    # Images that say which character (two bytes) and drawing they are, in one corner.
    images = np.zeros((1623, 20, 28, 28), dtype=np.uint8)
    images[:, :, 0, 0] = (np.arange(1623) // 256)[:, None]
    images[:, :, 0, 1] = (np.arange(1623) % 256)[:, None]
    images[:, :, 0, 2] = np.arange(20) + 1
    tasks.images = images
    return tasks


def identify(image: torch.Tensor) -> tuple[int, int, int]:
    """Return the character, drawing and quarter turns of one of the images above."""
    for turns in range(4):
        corner = torch.rot90(image[0] * 255, -turns, (0, 1)).round().long()[0, :3].tolist()
        if corner[2]:
            return corner[0] * 256 + corner[1], corner[2] - 1, turns
    raise AssertionError("no corner is marked")


@pytest.mark.parametrize("split", SPLITS)
def test_an_episode_holds_distinct_classes_and_drawings_of_its_split(
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


def test_a_split_that_is_not_rotated_shows_upright_characters(omniglot: Omniglot) -> None:
    tasks = make(omniglot, rotated_splits=["train"])
    turns = {identify(image)[2] for i in range(50) for image in tasks.task(0, "test", i).query_x}
    assert turns == {0}


def test_a_batch_is_its_tasks_side_by_side(omniglot: Omniglot) -> None:
    batch = omniglot.batch(1, "train", [4, 2])
    stacked = TaskBatch.stack([omniglot.task(1, "train", 4), omniglot.task(1, "train", 2)])
    assert all(torch.equal(a, b) for a, b in zip(batch, stacked, strict=True))
    assert batch.support_x.dtype == torch.float32 and batch.support_y.dtype == torch.int64


def test_the_split_is_fixed_and_covers_every_character_once() -> None:
    characters = [split_characters(split) for split in SPLITS]
    assert [len(c) for c in characters] == [1100, 100, 423] == list(SPLIT_SIZES.values())
    assert sorted(np.concatenate(characters)) == list(range(1623))
    # Another order would be another benchmark.
    assert [c[:3].tolist() for c in characters] == PINNED_CHARACTERS


PINNED_CHARACTERS = [[1035, 1472, 354], [445, 1296, 199], [1045, 1481, 1465]]


def test_zips_tree_and_torchvision_layout_give_the_same_images(
    synthetic_omniglot: Path, tmp_path: Path
) -> None:
    packed = load_images(synthetic_omniglot, tmp_path / "cache")
    assert packed.shape == (1623, 20, 28, 28) and packed.dtype == np.uint8
    assert packed.max() > 100 and packed.mean() < 60  # strokes white on black
    for half in synthetic_omniglot.iterdir():
        with zipfile.ZipFile(half) as archive:
            archive.extractall(tmp_path / "unpacked" / "omniglot-py")
    for root in (tmp_path / "unpacked", tmp_path / "unpacked" / "omniglot-py"):
        assert np.array_equal(load_images(root, tmp_path / "cache"), packed)


def test_a_sound_cache_is_used_and_a_damaged_one_rebuilt(
    synthetic_omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_images(synthetic_omniglot, tmp_path)
    (cache,) = tmp_path.iterdir()
    sound = cache.read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr("maml_pipeline.tasks.omniglot_images.pack", None)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)

    packings: list[object] = []

    def pack_again(halves: object) -> np.ndarray:
        packings.append(halves)
        return packed

    monkeypatch.setattr("maml_pipeline.tasks.omniglot_images.pack", pack_again)
    middle = len(sound) // 2
    flipped = sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :]
    for count, damaged in enumerate((b"", sound[:1000], sound[:-100], flipped), start=1):
        cache.write_bytes(damaged)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count


def test_several_processes_may_start_at_once(synthetic_omniglot: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as processes:
        results = list(processes.map(load_images, [synthetic_omniglot] * 2, [tmp_path] * 2))
    assert np.array_equal(results[0], results[1])
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_and_truncated_data_are_named(synthetic_omniglot: Path, tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    shutil.copytree(synthetic_omniglot, root)
    evaluation = root / "images_evaluation.zip"
    whole = evaluation.read_bytes()

    evaluation.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"images_evaluation.zip is truncated or damaged"):
        load_images(root, cache)

    evaluation.unlink()
    with pytest.raises(UserError, match=r"has images_background.zip but neither images_evaluation"):
        load_images(root, cache)

    with zipfile.ZipFile(evaluation, "w") as archive:
        archive.writestr("images_evaluation/A/character01/0000_01.png", b"not a picture")
    with pytest.raises(UserError, match=r"0000_01.png is truncated or damaged"):
        load_images(root, cache)
    assert not cache.exists()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.omniglot.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match=r"download failed .*no route.*MAML_OMNIGLOT_ROOT"):
        load_images(tmp_path / "empty", tmp_path / "cache")


def test_an_unwritable_cache_is_named(synthetic_omniglot: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir .*file/cache cannot be written"):
        load_images(synthetic_omniglot, tmp_path / "file" / "cache")


@pytest.fixture(scope="module")
def real_images(real_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return load_images(real_omniglot, tmp_path_factory.mktemp("cache"))


def test_the_real_omniglot_is_complete(real_images: np.ndarray) -> None:
    images = real_images
    assert images.shape == (1623, 20, 28, 28)
    ink = (images > 127).mean(axis=(2, 3))
    assert ink.min() > 0 and ink.max() < 0.5  # a drawing is never empty, and mostly background
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
