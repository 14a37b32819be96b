"""Few-shot classification over any data set of (image, class)."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maml_pipeline.environment import OFFLINE
from maml_pipeline.errors import UserError
from maml_pipeline.limits import MAX_IMAGE_SIZE
from maml_pipeline.tasks.class_splits import (
    ClassSplit,
    SplitByDataset,
    SplitByName,
    SplitBySize,
    read_names,
)
from maml_pipeline.tasks.image_cache import (
    PackedImages,
    cache_folder,
    load_or_pack,
    locked_cache,
    write_cache,
)
from maml_pipeline.tasks.image_episodes import ImageEpisodes
from maml_pipeline.tasks.image_fingerprint import fingerprint
from maml_pipeline.tasks.image_pixels import CHANNELS
from maml_pipeline.tasks.image_sources import (
    DatasetBuilder,
    Source,
    build,
    builder_name,
    downloads,
    experiment_name,
)
from maml_pipeline.tasks.task import SPLITS, Split

WAYS_TO_SPLIT = (
    "give either split_sizes, or train_classes, val_classes and test_classes, or, instead of dataset, "
    "train_dataset, val_dataset and test_dataset"
)


class ImageTasks(ImageEpisodes):
    """Classify images of N classes after seeing K of each, from any data set of (image, class).

    The data set is any map-style one, such as `torchvision.datasets.CIFAR100` or `ImageFolder`. Its
    classes are split in one of three ways: at random by `split_sizes`, by lists of names, or by a data
    set for each split. Classes are named by the data set's `class_to_idx` or `classes`, else by number.

    The images are scaled (not cropped) and kept as 8-bit pixels in a cache file, which all processes
    map into memory. A data set's own `transform` is applied once, when the cache is written.

    Args:
        image_size: Height and width.
        dataset: Builds the data set; in a config, its class path and arguments.
        pool: Arguments with each of which the data set is built, to pool the images: `[{train: true},
            {train: false}]` for all of CIFAR-100. Classes of the same name become one.
        split_sizes: The number of classes of train, val and test; or their shares of all classes, such
            as `[0.6, 0.2, 0.2]`.
        split_seed: Seed of the random split.
        train_classes: Names of the training classes; or a YAML file with a list, or a text file with one
            name per line. Classes that are in no list are not used.
        val_classes: Likewise for validation.
        test_classes: Likewise for the test.
        train_dataset: Builds the data set of the training classes, instead of `dataset`.
        val_dataset: Likewise for validation.
        test_dataset: Likewise for the test.
        ways: Classes N per task.
        shots: Support images K per class.
        query_shots: Query images per class.
        channels: 3 for colour, 1 for grey.
        rotated_splits: Splits in which each rotation of a class by a multiple of 90 degrees is a
            separate class.
        cache_dir: Folder for the cache of images; `None` for the user's cache folder.

    Shapes: images `(N * K, C, H, W)`, float32 in [0, 1]; labels `(N * K,)`, int64.

    Raises:
        UserError: An argument is out of range, or the classes are not split in one way.
    """

    def __init__(
        self,
        image_size: int,
        dataset: DatasetBuilder | None = None,
        pool: Sequence[dict[str, Any]] | None = None,
        split_sizes: Sequence[int | float] | None = None,
        split_seed: int = 0,
        train_classes: Sequence[str | int] | Path | None = None,
        val_classes: Sequence[str | int] | Path | None = None,
        test_classes: Sequence[str | int] | Path | None = None,
        train_dataset: DatasetBuilder | None = None,
        val_dataset: DatasetBuilder | None = None,
        test_dataset: DatasetBuilder | None = None,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 15,
        channels: int = 3,
        rotated_splits: Sequence[Split] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(ways, shots, query_shots, rotated_splits)
        if not 1 <= image_size <= MAX_IMAGE_SIZE:
            raise UserError(f"image_size is {image_size}; it must be 1 to {MAX_IMAGE_SIZE}")
        if channels not in CHANNELS:
            raise UserError(f"channels is {channels}; it must be 1 for grey or 3 for colour")
        self.image_size = image_size
        self.channels = channels
        if pool is not None and not len(pool):
            raise UserError("pool is empty; it must be a list of arguments, such as [{train: true}]")
        self.pool = [{}] if pool is None else [*pool]
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        by_split = dict(zip(SPLITS, (train_dataset, val_dataset, test_dataset), strict=True))
        classes = dict(zip(SPLITS, (train_classes, val_classes, test_classes), strict=True))
        self.class_split = _class_split(split_sizes, split_seed, classes, by_split)
        if isinstance(self.class_split, SplitByDataset):
            self.builders = {f"{split}_dataset": builder for split, builder in by_split.items()}
        else:
            self.builders = {"dataset": dataset}
        for key, builder in self.builders.items():
            _check_builder(key, builder)

    @cached_property
    def name(self) -> str:
        """Data set, ways and shots, such as `cifar100-5w1s`; an `ImageFolder` is named by its folder."""
        (builder, *_) = self.builders.values()
        assert builder is not None
        return f"{experiment_name(builder)}-{self.ways}w{self.shots}s"

    @cached_property
    def packed(self) -> PackedImages:
        """All images: uint8 `(number of images, C, H, W)`. Loaded on first use."""
        folder = cache_folder(self.cache_dir)
        builders = [builder for builder in self.builders.values() if builder is not None]
        if any(map(downloads, builders)) and not OFFLINE.get():
            with locked_cache(folder):  # so that only one process downloads
                sources = self._build()
        else:
            sources = self._build()
        key = fingerprint(sources, self.image_size, self.channels)
        shape = (sum(map(len, sources)), self.channels, self.image_size, self.image_size)
        names = [*dict.fromkeys(name for source in sources for name in source.class_names.values())]
        if all(source.class_names for source in sources):
            self._assign(names)  # so that an error is not reported only after minutes of packing
        return load_or_pack(
            folder / f"{sources[0].name.lower()}-{key}.npy",
            lambda file: write_cache(file, shape, self._images(sources), names),
        )

    def split_classes(self) -> dict[Split, np.ndarray]:
        splits = self._assign(self.packed.classes)
        count = np.bincount(self.packed.labels, minlength=len(self.packed.classes))
        for split, numbers in splits.items():
            fewest = numbers[count[numbers].argmin()]
            if self.shots + self.query_shots > count[fewest]:
                raise UserError(
                    f"shots + query_shots is {self.shots} + {self.query_shots} = "
                    f"{self.shots + self.query_shots}; it must be at most {count[fewest]}, the number "
                    f"of images of class {self.packed.classes[fewest]!r} in the {split} split"
                )
        return splits

    def _assign(self, classes: Sequence[str]) -> dict[Split, np.ndarray]:
        """Assign classes to splits, and check that each split has enough."""
        data = " and ".join(dict.fromkeys(builder_name(b) for b in self.builders.values() if b))
        splits = self.class_split.assign(classes, data)
        for split, numbers in splits.items():
            if self.ways > len(numbers):
                raise UserError(
                    f"ways is {self.ways}; it must be at most {len(numbers)}, the number of classes in "
                    f"the {split} split"
                )
        return splits

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the builders: a worker process maps the cache, and a lambda cannot be sent."""
        return super().__getstate__() | {"builders": {}}

    def _build(self) -> list[Source]:
        return [
            build(builder, key, "" if key == "dataset" else f"{key.removesuffix('_dataset')}/", **more)
            for key, builder in self.builders.items()
            if builder is not None
            for more in self.pool
        ]

    def _images(self, sources: Sequence[Source]) -> Iterator[tuple[np.ndarray, str]]:
        total = sum(map(len, sources))
        with tqdm(
            total=total, desc=f"Packing {sources[0].name}", unit=" images", disable=None
        ) as progress:
            for source in sources:
                for index in range(len(source)):
                    yield source.item(index, self.image_size, self.channels)
                    progress.update()


def _class_split(
    sizes: Sequence[int | float] | None,
    seed: int,
    classes: dict[Split, Sequence[str | int] | Path | None],
    datasets: dict[Split, DatasetBuilder | None],
) -> ClassSplit:
    """Return the one way of splitting that is given."""
    given = {
        "split_sizes": sizes is not None,
        "classes": any(names is not None for names in classes.values()),
        "dataset": any(builder is not None for builder in datasets.values()),
    }
    if sum(given.values()) != 1:
        number = "more than one" if any(given.values()) else "no"
        raise UserError(f"{number} split of the classes is given; {WAYS_TO_SPLIT}")
    if sizes is not None:
        # A config's whole numbers arrive as floats.
        return SplitBySize([int(size) if size % 1 == 0 else size for size in sizes], seed)
    for key, values in (("classes", classes), ("dataset", datasets)):
        missing = [f"{split}_{key}" for split, value in values.items() if value is None]
        if given[key] and missing:
            raise UserError(f"{missing[0]} is not given; {WAYS_TO_SPLIT}")
    if given["dataset"]:
        return SplitByDataset()
    return SplitByName(
        {
            split: read_names(f"{split}_classes", names)
            for split, names in classes.items()
            if names is not None
        }
    )


def _check_builder(key: str, builder: object) -> None:
    if builder is None:
        raise UserError(f"{key} is not given; name a data set, such as torchvision.datasets.CIFAR100")
    if not callable(builder):
        raise UserError(
            f"{key} is a {type(builder).__name__}; give a function that builds it, such as "
            "lambda: dataset"
        )
