"""Omniglot's episodes, split and images."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maml_pipeline import TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Omniglot
from maml_pipeline.tasks.image_cache import PackedImages
from maml_pipeline.tasks.omniglot import SPLIT_SIZES, split_characters
from maml_pipeline.tasks.omniglot_images import load_images
from maml_pipeline.tasks.task import SPLITS, Split


@pytest.fixture(scope="module")
def omniglot(synthetic_omniglot: Path, synthetic_cache: Path) -> Omniglot:
    tasks = Omniglot(root=synthetic_omniglot, cache_dir=synthetic_cache)
    # Images that encode their character (two bytes) and drawing in one corner.
    images = np.zeros((1623, 20, 28, 28), dtype=np.uint8)
    images[:, :, 0, 0] = (np.arange(1623) // 256)[:, None]
    images[:, :, 0, 1] = (np.arange(1623) % 256)[:, None]
    images[:, :, 0, 2] = np.arange(20) + 1
    classes = [*map(str, range(1623))]
    tasks.packed = PackedImages(images.reshape(-1, 1, 28, 28), np.repeat(np.arange(1623), 20), classes)
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
    tasks.packed = like.packed
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
    assert [len(c) for c in characters] == [1100, 100, 423] == [*SPLIT_SIZES]
    assert sorted(np.concatenate(characters)) == list(range(1623))
    # Another order would be a different benchmark.
    assert [c[:3].tolist() for c in characters] == PINNED_CHARACTERS


def test_other_numbers_of_characters_are_taken_in_the_same_order() -> None:
    usual, other = (
        np.concatenate([split_characters(split, sizes) for split in SPLITS])
        for sizes in (SPLIT_SIZES, (1150, 50, 423))
    )
    assert np.array_equal(usual, other)
    classes = Omniglot(ways=50, split_sizes=[1150, 50, 423]).split_classes()
    assert [len(classes[split]) for split in SPLITS] == [1150, 50, 423]
    with pytest.raises(UserError, match="it must be at most 50, the number of characters in the val"):
        Omniglot(ways=51, split_sizes=[1150, 50, 423])


PINNED_CHARACTERS = [[1035, 1472, 354], [445, 1296, 199], [1045, 1481, 1465]]


PINNED_EPISODES: dict[tuple[int, Split, int], tuple[str, str]] = {
    (0, "train", 0): ("7d4a3b1c407e7822", "476eff704ad9f159"),
    (7, "val", 3): ("0da919533fa907fc", "3aaeea9c895b98e6"),
    (1, "test", 1000000000000): ("69bc6fe4619530b5", "443c96a4818de631"),
}


@pytest.fixture(scope="module")
def real_images(real_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    return load_images(real_omniglot, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("numbers", PINNED_EPISODES, ids=str)
def test_episodes_do_not_change_between_versions(
    real_omniglot: Path, real_images: PackedImages, numbers: tuple[int, Split, int]
) -> None:
    settings = {"ways": 20, "shots": 5, "query_shots": 2, "rotated_splits": ["train"]}
    for kwargs, pinned in zip(({}, settings), PINNED_EPISODES[numbers], strict=True):
        tasks = Omniglot(root=real_omniglot, **kwargs)  # type: ignore[arg-type]
        tasks.packed = real_images
        task = b"".join(tensor.numpy().tobytes() for tensor in tasks.task(*numbers))
        assert hashlib.sha256(task).hexdigest()[:16] == pinned


@pytest.mark.exhaustive
def test_the_real_omniglot_is_complete(real_images: PackedImages) -> None:
    images = real_images.images
    assert images.shape == (1623 * 20, 1, 28, 28)
    ink = (images > 127).mean(axis=(1, 2, 3))
    assert ink.min() > 0 and ink.max() < 0.5  # not empty, and mostly background
    # Two drawings of one character are byte-identical in every copy of the data set; no others are.
    distinct = np.unique(images.reshape(1623 * 20, -1), axis=0)
    assert len(distinct) == 1623 * 20 - 1


def test_an_image_is_the_drawing_scaled_and_inverted(
    real_omniglot: Path, real_images: PackedImages
) -> None:
    name = "images_background/Alphabet_of_the_Magi/character01/0709_01.png"
    half = real_omniglot / "images_background.zip"
    if not half.exists():
        pytest.skip("reads the drawing from the zip")
    with zipfile.ZipFile(half) as archive, archive.open(name) as file, Image.open(file) as image:
        drawing = 255 - np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BOX))
    small = real_images.images[0, 0]
    assert np.corrcoef(small.ravel(), drawing.ravel())[0, 1] > 0.95
