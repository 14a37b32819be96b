"""Omniglot episodes: N-way K-shot classification of handwritten characters."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from maml_pipeline.errors import UserError
from maml_pipeline.limits import check_at_least
from maml_pipeline.tasks.omniglot_images import CHARACTERS, DRAWINGS, load_images
from maml_pipeline.tasks.task import SPLITS, Split, Task, TaskBatch, TaskDistribution, random_generator

SPLIT_SIZES: dict[Split, int] = {"train": 1100, "val": 100, "test": 423}


def split_characters(split: Split) -> np.ndarray:
    """Return the characters of a split, as indices into `Omniglot.images`; independent of the seed.

    The "background" and "evaluation" halves of Lake et al. are pooled and shuffled once, as in Finn
    et al. 2017.
    """
    # The key is part of the benchmark: another key is another split.
    shuffled = np.random.Generator(np.random.Philox(key=1623)).permutation(CHARACTERS)
    start = sum(SPLIT_SIZES[earlier] for earlier in SPLITS[: SPLITS.index(split)])
    return shuffled[start : start + SPLIT_SIZES[split]]


class Omniglot(TaskDistribution):
    """Classify characters of N classes after seeing K drawings of each.

    In a rotated split, each rotation of a character by a multiple of 90 degrees is a separate class.
    By default all splits are rotated, as in the code of Finn et al. 2017.

    Args:
        ways: Classes N per task, 2 to 100.
        shots: Support drawings K per class.
        query_shots: Query drawings per class; `shots + query_shots` is at most 20.
        root: Folder with `images_background` and `images_evaluation`, as folders or zips, or with
            torchvision's `omniglot-py`. `None` for the environment variable `MAML_OMNIGLOT_ROOT`, or
            `data/omniglot`. Omniglot is downloaded into it if it is missing.
        cache_dir: Folder for the cache of decoded images; `None` for the user's cache folder.
        rotated_splits: Splits to rotate.

    Shapes: images `(N * K, 1, 28, 28)`, float32, strokes 1 on 0; labels `(N * K,)`, int64.

    Raises:
        UserError: An argument is out of range, or `rotated_splits` contains an unknown split.

    References:
        Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
        induction", 2015; Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", 2017, section 5.2.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        query_shots: int = 1,
        root: str | Path | None = None,
        cache_dir: str | Path | None = None,
        rotated_splits: Sequence[Split] = SPLITS,
    ) -> None:
        check_at_least("ways", ways, 2)
        check_at_least("shots", shots, 1)
        check_at_least("query_shots", query_shots, 1)
        smallest = min(SPLIT_SIZES, key=lambda split: SPLIT_SIZES[split])
        if ways > SPLIT_SIZES[smallest]:
            raise UserError(
                f"ways is {ways}; it must be at most {SPLIT_SIZES[smallest]}, "
                f"the number of characters in the {smallest} split"
            )
        if shots + query_shots > DRAWINGS:
            raise UserError(
                f"shots + query_shots is {shots} + {query_shots} = {shots + query_shots}; "
                f"it must be at most {DRAWINGS}, the number of drawings of a character"
            )
        unknown = set(rotated_splits) - set(get_args(Split))
        if unknown:
            raise UserError(f"rotated_splits contains {sorted(unknown)}; the splits are {SPLITS}")
        self.ways = ways
        self.shots = shots
        self.query_shots = query_shots
        self.support_y = torch.arange(ways).repeat_interleave(shots)
        self.query_y = torch.arange(ways).repeat_interleave(query_shots)
        self.root = None if root is None else Path(root)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.rotations = {split: 4 if split in rotated_splits else 1 for split in SPLITS}
        self.characters = {split: split_characters(split) for split in SPLITS}

    @cached_property
    def images(self) -> np.ndarray:
        """All drawings: uint8 `(1623, 20, 28, 28)`, strokes 255 on 0. Loaded on first use."""
        return load_images(self.root, self.cache_dir)

    def prepare(self) -> None:
        """Download the data set and write its cache, if they are missing."""
        _ = self.images

    def task(self, seed: int, split: Split, index: int) -> Task:
        return Task(*(tensor[0] for tensor in self.batch(seed, split, [index])))

    def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
        # Indexing, rotating and scaling all tasks at once is three times as fast as one by one.
        episodes = [self._episode(seed, split, index) for index in indices]
        classes, drawings = (np.stack(drawn) for drawn in zip(*episodes, strict=True))

        rotations = self.rotations[split]
        characters = self.characters[split][classes // rotations]
        images = self.images[characters[..., None], drawings]
        quarter_turns = classes % rotations
        for turns in range(1, rotations):
            turned = quarter_turns == turns
            images[turned] = np.rot90(images[turned], turns, axes=(2, 3))

        x = torch.from_numpy(images).float().div_(255).unsqueeze(3)
        support_x, query_x = x[:, :, : self.shots], x[:, :, self.shots :]
        tasks = len(indices)
        return TaskBatch(
            support_x.flatten(1, 2),
            self.support_y.repeat(tasks, 1),
            query_x.flatten(1, 2),
            self.query_y.repeat(tasks, 1),
        )

    def _episode(self, seed: int, split: Split, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the classes `(N,)` of a task and the drawings `(N, shots + query_shots)` of each."""
        random = random_generator(seed, split, index)
        classes = SPLIT_SIZES[split] * self.rotations[split]
        drawings = random.permuted(np.tile(np.arange(DRAWINGS), (self.ways, 1)), axis=1)
        return (
            random.choice(classes, size=self.ways, replace=False),
            drawings[:, : self.shots + self.query_shots],
        )
