"""Omniglot episodes: N-way K-shot classification of handwritten characters."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.image_cache import PackedImages
from maml_pipeline.tasks.image_episodes import ImageEpisodes
from maml_pipeline.tasks.omniglot_images import CHARACTERS, DRAWINGS, load_images
from maml_pipeline.tasks.task import SPLITS, Split

SPLIT_SIZES = (1100, 100, 423)
"""Characters of train, val and test, as in the code of Finn et al. 2017."""


def split_characters(split: Split, sizes: Sequence[int] = SPLIT_SIZES) -> np.ndarray:
    """Return the characters of a split, numbered in the order of their paths; independent of the seed.

    The "background" and "evaluation" halves of Lake et al. are pooled and shuffled once, as in Finn
    et al. 2017.

    Args:
        split: The split.
        sizes: Characters of train, val and test.
    """
    # The key is part of the benchmark: another key is another split.
    shuffled = np.random.Generator(np.random.Philox(key=1623)).permutation(CHARACTERS)
    number = SPLITS.index(split)
    start = sum(sizes[:number])
    return shuffled[start : start + sizes[number]]


class Omniglot(ImageEpisodes):
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
        split_sizes: Characters of train, val and test, of 1,623.

    Shapes: images `(N * K, 1, 28, 28)`, float32, strokes 1 on 0; labels `(N * K,)`, int64.

    Raises:
        UserError: An argument is out of range, `rotated_splits` contains an unknown split, or
            `split_sizes` are not three numbers of characters.

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
        split_sizes: Sequence[int] = SPLIT_SIZES,
    ) -> None:
        super().__init__(ways, shots, query_shots, rotated_splits)
        if len(split_sizes) != len(SPLITS) or min(split_sizes) < 1 or sum(split_sizes) > CHARACTERS:
            raise UserError(
                f"split_sizes is {[*split_sizes]}; it must be three numbers from 1, the characters of "
                f"train, val and test, {CHARACTERS:,} in all"
            )
        self.split_sizes = tuple(split_sizes)
        fewest = min(self.split_sizes)
        if ways > fewest:
            raise UserError(
                f"ways is {ways}; it must be at most {fewest}, "
                f"the number of characters in the {SPLITS[self.split_sizes.index(fewest)]} split"
            )
        if shots + query_shots > DRAWINGS:
            raise UserError(
                f"shots + query_shots is {shots} + {query_shots} = {shots + query_shots}; "
                f"it must be at most {DRAWINGS}, the number of drawings of a character"
            )
        self.root = None if root is None else Path(root)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)

    @cached_property
    def packed(self) -> PackedImages:
        """All drawings: uint8 `(1623 * 20, 1, 28, 28)`, strokes 255 on 0. Loaded on first use."""
        return load_images(self.root, self.cache_dir)

    def split_classes(self) -> dict[Split, np.ndarray]:
        return {split: split_characters(split, self.split_sizes) for split in SPLITS}
