"""N-way K-shot episodes of packed images: what all image classification tasks have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maml_pipeline.errors import UserError
from maml_pipeline.limits import check_at_least
from maml_pipeline.tasks.image_cache import PackedImages
from maml_pipeline.tasks.random_generators import random_generators
from maml_pipeline.tasks.task import SPLITS, Split, Task, TaskBatch, TaskDistribution


class SplitImages(NamedTuple):
    """The images of a split, grouped by class.

    Args:
        order: Indices of the data set's images, those of a class beside each other.
        first: Where each of the split's classes starts in `order`.
        sizes: The number of images of each class.
    """

    order: np.ndarray
    first: np.ndarray
    sizes: np.ndarray


class ImageEpisodes(TaskDistribution):
    """Classify images of N classes after seeing K of each.

    Args:
        ways: Classes N per task.
        shots: Support images K per class.
        query_shots: Query images per class.
        rotated_splits: Splits in which each rotation of a class by a multiple of 90 degrees is a
            separate class.

    Raises:
        UserError: A number is below its minimum, or `rotated_splits` contains an unknown split.
    """

    def __init__(self, ways: int, shots: int, query_shots: int, rotated_splits: Sequence[Split]) -> None:
        check_at_least("ways", ways, 2)
        check_at_least("shots", shots, 1)
        check_at_least("query_shots", query_shots, 1)
        unknown = set(rotated_splits) - set(SPLITS)
        if unknown:
            raise UserError(f"rotated_splits contains {sorted(unknown)}; the splits are {SPLITS}")
        self.ways = ways
        self.shots = shots
        self.query_shots = query_shots
        self.support_y = torch.arange(ways).repeat_interleave(shots)
        self.query_y = torch.arange(ways).repeat_interleave(query_shots)
        self.rotations = {split: 4 if split in rotated_splits else 1 for split in SPLITS}

    @cached_property
    @abstractmethod
    def packed(self) -> PackedImages:
        """All images of the data set. Loaded on first use."""

    @abstractmethod
    def split_classes(self) -> Mapping[Split, np.ndarray]:
        """Return the classes of each split, as indices into `packed.classes`."""

    def prepare(self) -> None:
        """Download the data set and write its cache, if they are missing."""
        _ = self.split_images

    @cached_property
    def split_images(self) -> dict[Split, SplitImages]:
        """The images of each split, grouped by class."""
        labels, classes = self.packed.labels, len(self.packed.classes)
        count = np.bincount(labels, minlength=classes)
        first = np.cumsum(count) - count
        order = np.argsort(labels, kind="stable")
        return {
            split: SplitImages(order, first[numbers], count[numbers])
            for split, numbers in self.split_classes().items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Load the images before a worker process is started, so that it need not."""
        _ = self.split_images
        return self.__dict__

    def task(self, seed: int, split: Split, index: int) -> Task:
        return Task(*(tensor[0] for tensor in self.batch(seed, split, [index])))

    def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
        # Indexing, rotating and scaling all tasks at once is three times as fast as one by one.
        there, rotations = self.split_images[split], self.rotations[split]
        episodes = [
            self._episode(random, there.sizes, rotations)
            for random in random_generators(seed, split, indices)
        ]
        classes, positions = (np.stack(drawn) for drawn in zip(*episodes, strict=True))
        images = there.order[there.first[classes // rotations][..., None] + positions]
        turns, tasks = classes % rotations, len(indices)
        return TaskBatch(
            self._read(images[..., : self.shots], turns),
            self.support_y.repeat(tasks, 1),
            self._read(images[..., self.shots :], turns),
            self.query_y.repeat(tasks, 1),
        )

    def _read(self, images: np.ndarray, turns: np.ndarray) -> Tensor:
        """Return images `(T, N * K, C, H, W)`, float32 in [0, 1].

        Args:
            images: Their indices, `(T, N, K)`.
            turns: Quarter turns by which to rotate the images of each class, `(T, N)`.
        """
        pixels = self.packed.images[images]
        for number in range(1, 4):
            turned = turns == number
            pixels[turned] = np.rot90(pixels[turned], number, axes=(-2, -1))
        return torch.from_numpy(pixels).flatten(1, 2).float().div_(255)

    def _episode(
        self, random: np.random.Generator, sizes: np.ndarray, rotations: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw the classes `(N,)` of a task and the images `(N, shots + query_shots)` of each.

        Args:
            random: The task's generator.
            sizes: The number of images of each class of the split.
            rotations: The number of rotations of each class.
        """
        # The order of these draws is part of every result: another order is another benchmark.
        most = sizes.max()
        positions = random.permuted(np.tile(np.arange(most), (self.ways, 1)), axis=1)
        classes = random.choice(len(sizes) * rotations, size=self.ways, replace=False)
        if sizes.min() < most:
            # A permutation of more numbers than a class has images, without those that it lacks.
            lacking = positions >= sizes[classes // rotations][:, None]
            positions = np.take_along_axis(positions, np.argsort(lacking, axis=1, kind="stable"), axis=1)
        return classes, positions[:, : self.shots + self.query_shots]
