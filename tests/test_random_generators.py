"""The random generator of a task: Philox, keyed by (seed, split), counting from the task's index."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maml_pipeline.tasks import Split, random_generator, random_generators
from maml_pipeline.tasks.task import SPLITS

LARGEST = 2**64 - 1
WORDS = st.one_of(st.integers(0, LARGEST), st.integers(LARGEST - 4, LARGEST), st.integers(0, 4))
DRAWS: dict[str, Callable[[np.random.Generator], object]] = {
    "doubles": lambda random: random.random(5),
    "half a word": lambda random: random.random(3, dtype=np.float32),  # leaves 32 bits behind
    "normal": lambda random: random.standard_normal(3),
    "permuted": lambda random: random.permuted(np.arange(9)),
    "choice": lambda random: random.choice(100, size=3, replace=False),
    "nothing": lambda random: None,
}
"""Draws that use up whole blocks of Philox, parts of them, or nothing."""

PINNED_PHILOX_NUMBER = 14323720939946869941


def reference(seed: int, split: Split, index: int) -> np.random.Generator:
    """Build NumPy's own generator with the documented key and counter."""
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def numbers(generators: Iterable[np.random.Generator]) -> list[list[int]]:
    return [generator.bit_generator.random_raw(6).tolist() for generator in generators]


def test_random_numbers_do_not_change_between_versions() -> None:
    # Philox is exactly defined; this pins its key and counter, on which every result depends.
    assert random_generator(3, "val", 5).bit_generator.random_raw() == PINNED_PHILOX_NUMBER


@given(WORDS, st.sampled_from(SPLITS), WORDS)
def test_a_generator_is_philox_with_the_documented_key_and_counter(
    seed: int, split: Split, index: int
) -> None:
    assert numbers([random_generator(seed, split, index)]) == numbers([reference(seed, split, index)])


@given(WORDS, st.sampled_from(SPLITS), st.lists(WORDS), st.sampled_from([*DRAWS]))
def test_several_generators_equal_those_of_their_indices(
    seed: int, split: Split, indices: list[int], draw: str
) -> None:
    together = random_generators(seed, split, indices)
    for index, random in zip(indices, together, strict=True):
        alone = reference(seed, split, index)
        np.testing.assert_equal(DRAWS[draw](random), DRAWS[draw](alone))
        assert numbers([random]) == numbers([alone])


@given(st.lists(st.tuples(WORDS, st.sampled_from(SPLITS)), min_size=2, max_size=4), st.lists(WORDS))
def test_interleaved_iterations_do_not_affect_each_other(
    keys: list[tuple[int, Split]], indices: list[int]
) -> None:
    turns = zip(*(random_generators(*key, indices) for key in keys), strict=True)
    for index, turn in zip(indices, turns, strict=True):
        assert numbers(turn) == numbers(reference(*key, index) for key in keys)


KEEPERS: dict[str, Callable[[np.random.Generator], object]] = {
    "the generator": lambda random: random,
    "its bit generator": lambda random: random.bit_generator,
    "a method": lambda random: random.random,
    "a function": lambda random: lambda: random.random(),
    "another generator": lambda random: np.random.Generator(random.bit_generator),
}


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_generator_that_is_kept_stays_that_of_its_task(keeper: str, every: int) -> None:
    indices = range(12)
    kept: dict[int, object] = {}
    states = {}
    for index, random in zip(indices, random_generators(7, "train", indices), strict=True):
        random.random(index)
        if index % every == 0:
            kept[index] = KEEPERS[keeper](random)
            expected = reference(7, "train", index)
            expected.random(index)
            states[index] = copy.deepcopy(expected.bit_generator.state)
    for index, value in kept.items():
        np.testing.assert_equal(bit_generator_of(value).state, states[index])


def bit_generator_of(kept: Any) -> Any:
    """Return the bit generator behind a value of `KEEPERS`."""
    if isinstance(kept, np.random.BitGenerator):
        return kept
    if isinstance(kept, np.random.Generator):
        return kept.bit_generator
    is_method = hasattr(kept, "__self__")
    return bit_generator_of(kept.__self__ if is_method else kept.__closure__[0].cell_contents)


def test_a_list_of_generators_may_be_drawn_from_in_any_order() -> None:
    indices = [3, 1, LARGEST, 4, 1]
    kept = [*random_generators(0, "test", indices)]
    expected = [reference(0, "test", index) for index in indices]
    assert numbers(reversed(kept)) == numbers(reversed(expected))
    assert numbers(kept) == numbers(expected)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_number_that_no_task_has_is_rejected(value: int) -> None:
    with pytest.raises(OverflowError):
        random_generator(value, "train", 0)
    with pytest.raises(OverflowError):
        [*random_generators(0, "train", [0, value])]
