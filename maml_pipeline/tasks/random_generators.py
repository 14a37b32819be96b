"""The random generator of a task: a pure function of (seed, split, index)."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from maml_pipeline.tasks.task import SPLITS, Split


def random_generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """Return an independent random generator for one task.

    Philox is counter-based: the key contains the seed and the split, and the counter starts at the
    task's own block of 2^128 numbers. No state is shared between tasks.

    Args:
        seed: Seed, 0 to 2^64 - 1.
        split: Split that the task belongs to.
        index: Number of the task in the split, 0 to 2^64 - 1.

    References:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    bit_generator = np.random.Philox(UNSEEDED)
    bit_generator.state = _state(seed, split, [0, 0, index, 0])
    return np.random.Generator(bit_generator)


def random_generators(seed: int, split: Split, indices: Iterable[int]) -> Iterator[np.random.Generator]:
    """Iterate over the random generators of several tasks, each equal to that of `random_generator`.

    Several times as fast, because two bit generators take turns. Use each generator at once. One that is
    kept, as by `list`, still belongs to its task alone: a bit generator that is referred to when its
    next turn comes is replaced by a new one.

    Args:
        seed: Seed, 0 to 2^64 - 1.
        split: Split that the tasks belong to.
        indices: Numbers of the tasks in the split, 0 to 2^64 - 1, in any order.

    Yields:
        The generator of each index, in order.
    """
    counter = [0, 0, 0, 0]
    state = _state(seed, split, counter)
    # Two, because the caller's loop variable keeps the latest generator until it gets the next one.
    current, latest = np.random.Philox(UNSEEDED), np.random.Philox(UNSEEDED)
    references = sys.getrefcount(current)
    for index in indices:
        current, latest = latest, current
        if sys.getrefcount(current) > references:
            current = np.random.Philox(UNSEEDED)
        counter[2] = index
        current.state = state
        yield np.random.Generator(current)


def _state(seed: int, split: Split, counter: list[int]) -> Any:
    """Return the state of a Philox that has drawn nothing; its four buffered numbers count as used."""
    return {
        "bit_generator": "Philox",
        "state": {"key": (seed, SPLITS.index(split)), "counter": counter},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }


class _Unseeded(ISeedSequence):
    """Keeps NumPy from reading the system's entropy for a state that is replaced at once."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return zeros."""
        return np.zeros(n_words, dtype)


UNSEEDED: Any = _Unseeded()  # NumPy's annotations lack its own interface ISeedSequence
