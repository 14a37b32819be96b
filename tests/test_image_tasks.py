"""ImageTasks: episodes of any data set of (image, class), its splits, its images and its cache."""

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from maml_pipeline import TaskBatch
from maml_pipeline.environment import OFFLINE
from maml_pipeline.errors import UserError
from maml_pipeline.learner import TaskDataModule
from maml_pipeline.tasks import ImageTasks, Omniglot
from maml_pipeline.tasks.image_pixels import to_pixels
from maml_pipeline.tasks.task import SPLITS
from tests.helpers import Maml

SIDE = 8


class Shades(Dataset[Any]):
    """Constant images of 12 classes of different sizes; a pixel tells class and number of its image.

    Args:
        root: Not used.
        first: Number of the first image of each class.
        download: Recorded in `downloads`.
    """

    classes: ClassVar = [f"shade {number}" for number in range(12)]
    downloads: ClassVar[list[bool]] = []

    def __init__(self, root: str = "", first: int = 0, download: bool = False) -> None:
        Shades.downloads.append(download)
        self.items = [(label, first + i) for i in range(10) for label in range(12) if i < 6 + label % 5]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, number = self.items[index]
        return np.full((SIDE, SIDE, 3), (label, number, 0), dtype=np.uint8), label


class Attributes(Shades):
    """A data set of images and attributes."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0], torch.zeros(40)


class OnlyImages(Shades):
    """A data set without classes."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


class RandomImages(Shades):
    """A data set with a random transform."""

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, SIDE, SIDE), 0


class Normalized(Shades):
    """A data set with normalized images."""

    def __getitem__(self, index: int) -> Any:
        return torch.linspace(-2, 2, 3 * SIDE * SIDE).reshape(3, SIDE, SIDE), 0


class Broken(Shades):
    """A data set that cannot be built."""

    def __init__(self) -> None:
        raise RuntimeError("the archive is missing")


def shades(cache: Path, **settings: Any) -> ImageTasks:
    """Return tasks of 6, 3 and 3 shades."""
    defaults: dict[str, Any] = {
        "dataset": Shades,
        "split_sizes": [6, 3, 3],
        "ways": 3,
        "shots": 2,
        "query_shots": 4,
    }
    return ImageTasks(image_size=SIDE, cache_dir=cache, **defaults | settings)


def identify(images: torch.Tensor) -> list[tuple[int, int]]:
    """Return the class and the number of each of the images of `Shades`."""
    return [tuple(pixel) for pixel in (images[:, :2, 0, 0] * 255).round().int().tolist()]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_episode_has_distinct_images_of_distinct_classes_of_its_split(tmp_path: Path) -> None:
    tasks = shades(tmp_path)
    seen: dict[str, set[int]] = {split: set() for split in SPLITS}
    drawn: set[tuple[int, int]] = set()
    for split in SPLITS:
        for index in range(100):
            task = tasks.task(0, split, index)
            assert task.support_y.tolist() == [0, 0, 1, 1, 2, 2]
            assert task.query_y.bincount().tolist() == [4, 4, 4]
            found = identify(torch.cat([task.support_x, task.query_x]))
            assert len({*found}) == len(found) == 18
            labels = torch.cat([task.support_y, task.query_y]).tolist()
            of_label = {
                label: {shade for (shade, _), one in zip(found, labels, strict=True) if one == label}
                for label in range(3)
            }
            assert all(len(classes) == 1 for classes in of_label.values())
            assert len(set.union(*of_label.values())) == 3
            seen[split] |= {shade for shade, _ in found}
            drawn |= {*found}
    assert [len(seen[split]) for split in SPLITS] == [6, 3, 3]
    assert set.union(*seen.values()) == {*range(12)}
    assert len(drawn) == len(Shades())  # also the last image of the largest class


def test_a_task_depends_on_seed_split_and_index_only(tmp_path: Path) -> None:
    numbers = [(seed, split, index) for seed in (0, 1) for split in SPLITS for index in (0, 10**12)]
    one = {n: shades(tmp_path).task(*n) for n in numbers}
    other = {n: shades(tmp_path).task(*n) for n in reversed(numbers)}
    for a in numbers:
        for b in numbers:
            assert same(one[a], other[b]) == (a == b)


def test_a_batch_equals_its_stacked_tasks_also_after_pickling(tmp_path: Path) -> None:
    tasks = shades(tmp_path, rotated_splits=["train"], dataset=lambda: Shades())
    batch = tasks.batch(3, "train", [4, 2])
    assert same(batch, TaskBatch.stack([tasks.task(3, "train", 4), tasks.task(3, "train", 2)]))
    sent = pickle.dumps(tasks)
    assert len(sent) < 10_000  # the images are not copied
    assert same(pickle.loads(sent).batch(3, "train", [4, 2]), batch)


@pytest.mark.integration
def test_workers_draw_the_same_tasks(tmp_path: Path) -> None:
    tasks = shades(tmp_path)
    data = TaskDataModule(tasks, meta_batch_size=4, num_workers=2)
    loader = iter(data.train_dataloader())
    for step in range(3):
        assert same(next(loader), tasks.batch(0, "train", range(4 * step, 4 * step + 4)))


def test_a_folder_of_omniglots_drawings_gives_omniglots_episodes(
    synthetic_omniglot: Path, synthetic_cache: Path, tmp_path: Path
) -> None:
    omniglot = Omniglot(
        ways=5, shots=2, query_shots=3, root=synthetic_omniglot, cache_dir=synthetic_cache
    )
    tasks = ImageTasks(
        image_size=28,
        dataset=partial(Drawings, omniglot),
        split_sizes=[1100, 100, 423],
        split_seed=1623,
        ways=5,
        shots=2,
        query_shots=3,
        channels=1,
        rotated_splits=SPLITS,
        cache_dir=tmp_path,
    )
    for split in SPLITS:
        assert same(tasks.batch(1, split, range(5)), omniglot.batch(1, split, range(5)))


class Drawings(Dataset[Any]):
    """Omniglot's drawings, as images of numbered classes."""

    def __init__(self, omniglot: Omniglot) -> None:
        self.images = omniglot.packed.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.images[index])), index // 20


def test_an_image_folder_gives_the_pixels_that_omniglot_gives(
    real_omniglot: Path, tmp_path: Path
) -> None:
    from maml_pipeline.tasks.omniglot_download import find_halves
    from maml_pipeline.tasks.omniglot_images import decode, iterate_drawings

    halves = find_halves(real_omniglot)
    assert halves is not None
    drawings = [
        (Path(name), read())
        for _, (name, read) in zip(range(120), iterate_drawings(halves[0]), strict=False)
    ]
    expected = np.stack([decode(str(name), partial(bytes, content)) for name, content in drawings])
    for name, content in drawings:
        file = tmp_path / "omniglot" / name.parent.name / name.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    tasks = ImageTasks(
        image_size=28,
        dataset=partial(ImageFolder, str(tmp_path / "omniglot")),
        split_sizes=[2, 2, 2],
        ways=2,
        channels=1,
        cache_dir=tmp_path / "cache",
    )
    assert tasks.name == "omniglot-2w1s"
    assert np.array_equal(255 - tasks.packed.images[:, 0], expected)


# Splits -----------------------------------------------------------------------------------------


def test_classes_are_split_by_lists_of_names(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("shade 3\n\nshade 4\nshade 5\n")
    (tmp_path / "test.yaml").write_text("- shade 6\n- shade 7\n- shade 8\n")
    lists = {
        "train_classes": ["shade 2", "shade 0", "shade 1"],
        "val_classes": tmp_path / "val.txt",
        "test_classes": tmp_path / "test.yaml",
    }
    tasks = shades(tmp_path, split_sizes=None, **lists)
    assert {split: numbers.tolist() for split, numbers in tasks.split_classes().items()} == {
        "train": [2, 0, 1],
        "val": [3, 4, 5],
        "test": [6, 7, 8],
    }


def test_a_random_split_depends_on_its_seed_only(tmp_path: Path) -> None:
    def split(seed: int) -> list[list[int]]:
        return [
            numbers.tolist() for numbers in shades(tmp_path, split_seed=seed).split_classes().values()
        ]

    assert split(0) == split(0) != split(1)
    assert split(0) == PINNED_SPLIT  # another one would be a different benchmark


def test_shares_of_the_classes_give_the_split_of_their_numbers(tmp_path: Path) -> None:
    def split(sizes: list[float]) -> list[list[int]]:
        splits = shades(tmp_path, split_sizes=sizes, ways=2).split_classes()
        return [numbers.tolist() for numbers in splits.values()]

    assert split([0.5, 0.25, 0.25]) == split([6, 3, 3])
    assert [*map(len, split([0.6, 0.2, 0.2]))] == [7, 3, 2]  # no class of 12 is left out
    assert [*map(len, split([0.3, 0.2, 0.2]))] == [4, 2, 2]


PINNED_SPLIT = [[0, 7, 6, 1, 9, 3], [8, 10, 5], [2, 4, 11]]


def test_each_split_can_have_its_own_data_set(tmp_path: Path) -> None:
    for number, split in enumerate(SPLITS):
        picture_folder(tmp_path / "birds" / split, classes=range(3 * number, 3 * number + 3))
    tasks = ImageTasks(
        image_size=SIDE,
        ways=3,
        query_shots=2,
        cache_dir=tmp_path / "cache",
        **{
            f"{split}_dataset": partial(ImageFolder, str(tmp_path / "birds" / split)) for split in SPLITS
        },  # type: ignore[arg-type]
    )
    assert tasks.name == "birds-3w1s"
    assert tasks.packed.classes == [
        f"{split}/bird {i}" for split, i in zip(np.repeat(SPLITS, 3), range(9), strict=True)
    ]
    assert [numbers.tolist() for numbers in tasks.split_classes().values()] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def picture_folder(folder: Path, classes: Sequence[int] = range(9), images: int = 4) -> Path:
    """Write a folder of random pictures for each class, each of its own size."""
    random = np.random.default_rng(classes[0])
    for number in classes:
        (folder / f"bird {number}").mkdir(parents=True)
        for image in range(images):
            pixels = random.integers(256, size=(9 + number, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"bird {number}" / f"{image}.png")
    return folder


def test_pooled_data_sets_share_classes_of_the_same_name(tmp_path: Path) -> None:
    tasks = shades(tmp_path, pool=[{"first": 0}, {"first": 100}])
    assert len(tasks.packed.classes) == 12
    assert len(tasks.packed.images) == 2 * len(Shades())
    numbers = {
        number for index in range(50) for _, number in identify(tasks.task(0, "train", index).query_x)
    }
    assert min(numbers) < 10 and max(numbers) >= 100


# Images -----------------------------------------------------------------------------------------

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)


def png_of(mode: str) -> Image.Image:
    return Image.fromarray(COLOUR).convert(mode)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), np.stack([GREY] * 3)),
        (Image.fromarray(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3)),
        (Image.fromarray(GREY.astype(np.float32) / 255), np.stack([GREY] * 3)),
        (Image.fromarray(GREY > 31), np.stack([255 * (GREY > 31).astype(np.uint8)] * 3)),
        (Image.fromarray(GREY % 4).convert("P"), np.stack([GREY % 4] * 3)),
        (Image.fromarray(COLOUR), COLOUR.transpose(2, 0, 1)),
        (Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])), COLOUR.transpose(2, 0, 1)),
        (Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)])), np.full((3, 8, 8), 255)),
        (COLOUR, COLOUR.transpose(2, 0, 1)),
        (GREY[..., None], np.stack([GREY] * 3)),
        (torch.from_numpy(COLOUR).permute(2, 0, 1), COLOUR.transpose(2, 0, 1)),
        (torch.from_numpy(COLOUR).permute(2, 0, 1) / 255, COLOUR.transpose(2, 0, 1)),
        (torch.from_numpy(GREY), np.stack([GREY] * 3)),
    ],
    ids=[
        "grey",
        "16-bit",
        "float",
        "1-bit",
        "palette",
        "colour",
        "opaque",
        "transparent",
        "array",
        "grey-array",
        "tensor",
        "float-tensor",
        "grey-tensor",
    ],
)
def test_images_of_every_kind_are_converted(image: Any, expected: np.ndarray) -> None:
    assert np.array_equal(to_pixels(image, 8, channels=3), expected)
    assert to_pixels(image, 5, channels=1).shape == (1, 5, 5)


def test_pictures_of_16_bits_and_with_transparency_are_not_clipped_in_a_folder(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "birds")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "bird 0" / "0.png")
    Image.fromarray(np.dstack([COLOUR, np.zeros_like(GREY)])).save(folder / "bird 0" / "1.png")
    images = birds(tmp_path).packed.images
    assert np.array_equal(images[0], np.stack([GREY] * 3))
    assert images[1].min() == 255


def birds(folder: Path, **settings: Any) -> ImageTasks:
    """Return tasks of the pictures in `birds`."""
    dataset = partial(ImageFolder, str(folder / "birds"))
    defaults: dict[str, Any] = {
        "dataset": dataset,
        "split_sizes": [3, 3, 3],
        "ways": 3,
        "query_shots": 2,
    }
    return ImageTasks(image_size=SIDE, cache_dir=folder / "cache", **defaults | settings)


# Cache ------------------------------------------------------------------------------------------


def test_images_are_packed_again_only_if_something_changed(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "birds")

    def caches() -> int:
        birds(tmp_path).prepare()
        return len([*(tmp_path / "cache").glob("*.npy")])

    assert caches() == caches() == 1
    (folder / "bird 3" / "2.png").write_bytes((folder / "bird 3" / "1.png").read_bytes())
    assert caches() == 2
    (folder / "bird 3" / "2.png").unlink()
    assert caches() == 3
    birds(tmp_path, query_shots=1, ways=2, split_sizes=[2, 2, 2]).prepare()  # the same images
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 3
    birds(tmp_path, channels=1, query_shots=1).prepare()
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 4


def test_nothing_is_read_before_the_first_task(tmp_path: Path) -> None:
    def fail() -> Dataset[Any]:
        raise AssertionError

    assert shades(tmp_path / "cache", dataset=fail).ways == 3
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("is_offline", [False, True])
def test_data_are_downloaded_unless_that_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool
) -> None:
    monkeypatch.setenv(OFFLINE.name, str(int(is_offline)))
    monkeypatch.setattr(Shades, "downloads", [])
    shades(tmp_path, dataset=partial(Shades, download=True)).prepare()
    assert Shades.downloads == [not is_offline]


def test_a_cache_that_can_only_be_read_suffices_where_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades(tmp_path, dataset=partial(Shades, download=True)).prepare()
    monkeypatch.setenv(OFFLINE.name, "1")

    def refuse(folder: Path) -> None:
        raise PermissionError(folder)

    monkeypatch.setattr("maml_pipeline.tasks.image_tasks.locked_cache", refuse)
    assert len(shades(tmp_path, dataset=partial(Shades, download=True)).packed.classes) == 12


# Errors -----------------------------------------------------------------------------------------


def damage_a_picture(folder: Path) -> None:
    file = folder / "birds" / "bird 4" / "1.png"
    file.write_bytes(file.read_bytes()[:100])


def remove_pictures(folder: Path) -> None:
    for number in (0, 1):
        (folder / "birds" / "bird 5" / f"{number}.png").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_a_picture, r"dataset ImageFolder: .*bird 4/1.png cannot be read"),
        (remove_pictures, r"shots \+ query_shots is 1 \+ 2 = 3; it must be at most 2, .* 'bird 5'"),
    ],
)
def test_a_damaged_folder_is_reported_with_the_file_or_class(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    picture_folder(tmp_path / "birds")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        birds(tmp_path).prepare()
    if damage is damage_a_picture:
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 4}, "ways is 4; it must be at most 3, the number of classes in the val split"),
        ({"ways": 1}, "ways is 1; it must be at least 2"),
        ({"query_shots": 5}, "2 [+] 5 = 7; it must be at most 6, the number of images of class 'shade"),
        ({"channels": 2}, "channels is 2; it must be 1 for grey or 3 for colour"),
        ({"rotated_splits": ["valid"]}, "rotated_splits contains .'valid'.; the splits are"),
        ({"split_sizes": [6, 3]}, "split_sizes is .6, 3.; it must be three numbers"),
        ({"split_sizes": [0.6, 0.3, 0.2]}, "three shares that add up to at most 1"),
        ({"split_sizes": [0.9, 0.05, 0.05]}, "gives split val none of the 12 classes of Shades"),
        ({"split_sizes": [6, 3, 4]}, "13 classes, but Shades has 12"),
        ({"split_sizes": None}, "no split of the classes is given"),
        ({"train_classes": ["shade 0"]}, "more than one split of the classes is given"),
        ({"split_sizes": None, "train_classes": ["shade 0"]}, "val_classes is not given"),
        ({"dataset": None}, "dataset is not given"),
        ({"dataset": Shades()}, "dataset is a Shades; give a function that builds it"),
        ({"pool": []}, "pool is empty"),
        ({"dataset": Broken}, "dataset Broken cannot be built: the archive is missing"),
        ({"dataset": list}, "dataset list cannot be built: it has no images"),
        ({"dataset": OnlyImages}, r"OnlyImages: image 0 is ndarray; an item must be \(image, class\)"),
        ({"dataset": Attributes}, "image 0 has class Tensor; a class must be a whole number or a name"),
        ({"dataset": RandomImages}, "another image when image .* is read again; leave out random"),
        ({"dataset": Normalized}, r"values from -2 to 2; floats must lie in \[0, 1\]"),
    ],
)  # fmt: skip
def test_settings_and_data_sets_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shades(tmp_path / "cache", **settings).prepare()
    assert not [*tmp_path.rglob("*.unfinished")]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (["shade 6", "Shade 77"], "test_classes contains 'Shade 77', which Shades .*mean 'shade 7'?"),
        (["shade 6", "shade 0"], "test_classes contains 'shade 0', as train_classes does"),
        (["shade 6", "shade 6"], "test_classes contains 'shade 6' twice"),
        ([], "test_classes is empty"),
    ],
)
def test_wrong_lists_of_classes_are_refused(tmp_path: Path, test: list[str], message: str) -> None:
    lists = {"train_classes": ["shade 0", "shade 1", "shade 2"], "val_classes": ["shade 3"]}
    with pytest.raises(UserError, match=message):
        shades(tmp_path, split_sizes=None, ways=2, **lists, test_classes=test).prepare()


def test_data_sets_of_the_splits_must_not_share_a_class(tmp_path: Path) -> None:
    settings = {f"{split}_dataset": Shades for split in SPLITS}
    with pytest.raises(UserError, match="val_dataset has class 'shade 0', as train_dataset has"):
        shades(tmp_path, dataset=None, split_sizes=None, **settings).prepare()


def test_prepare_packs_the_data_of_a_config(maml: Maml, tmp_path: Path) -> None:
    picture_folder(tmp_path / "birds")
    (tmp_path / "birds.yaml").write_text(
        """
model: {network: {class_path: maml_pipeline.networks.ConvNet, init_args: {ways: 2, in_channels: 3}},
        loss: torch.nn.functional.cross_entropy, inner_lr: 0.1}
data:
  tasks:
    class_path: maml_pipeline.tasks.ImageTasks
    init_args:
      image_size: 8
      dataset: {class_path: torchvision.datasets.ImageFolder, init_args: {root: birds}}
      split_sizes: [3, 3, 2]
      ways: 2
      query_shots: 2
      cache_dir: cache
"""
    )
    printed = maml("prepare", "--config", "birds.yaml")
    (cache,) = (tmp_path / "cache").glob("*.npy")
    assert printed.splitlines() == [
        f"Cache:   {cache.relative_to(tmp_path)}",
        "Images:  36 of 3 x 8 x 8",
        "Classes: 3 train, 3 val, 2 test; 1 not used",
    ]
    assert maml("prepare", "--config", "toy") == "Lines: ready\n"
