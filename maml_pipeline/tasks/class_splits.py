"""Which classes of a data set belong to which split."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.files import expand_home
from maml_pipeline.tasks.task import SPLITS, Split
from maml_pipeline.text import counted

ROUNDING = 1e-6
"""Shares such as 0.6, 0.2 and 0.2 add up to 1 except for rounding."""


class ClassSplit(Protocol):
    """A rule that assigns classes to splits."""

    def assign(self, classes: Sequence[str], data: str) -> dict[Split, np.ndarray]:
        """Assign classes to splits.

        Args:
            classes: The names of the data set's classes.
            data: The data set's name, for error messages.

        Returns:
            For each split, indices into `classes`.

        Raises:
            UserError: The data set does not have the classes that the rule needs.
        """


@dataclass(frozen=True)
class SplitBySize:
    """Shuffle the classes with a seed; the first belong to train, the next to val, the next to test.

    Args:
        sizes: The number of classes of each split; or its share of the classes, of which one at least
            has a fraction.
        seed: Seed of the permutation, the key of a Philox generator.

    Raises:
        UserError: A number is out of range.
    """

    sizes: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        in_range = len(self.sizes) == len(SPLITS) and (
            min(self.sizes) > 0 and sum(self.sizes) <= 1 + ROUNDING
            if self._are_shares
            else min(self.sizes) >= 1
        )
        if not in_range:
            raise UserError(
                f"split_sizes is {[*self.sizes]}; it must be three numbers from 1, the classes of "
                "train, val and test, or three shares that add up to at most 1"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"split_seed is {self.seed}; it must be a whole number from 0 to 2^64 - 1")

    def assign(self, classes: Sequence[str], data: str) -> dict[Split, np.ndarray]:
        shuffled = np.random.Generator(np.random.Philox(key=self.seed)).permutation(len(classes))
        ends = np.cumsum(self.sizes)
        if self._are_shares:
            ends = np.rint(ends * len(classes))  # of the ends, so that shares of 1 use every class
        if ends[-1] > len(classes):
            raise UserError(
                f"split_sizes is {[*self.sizes]}, {sum(self.sizes)} classes, but {data} has "
                f"{len(classes)}; make them smaller"
            )
        parts = np.split(shuffled[: int(ends[-1])], ends[:-1].astype(int))
        splits = dict(zip(SPLITS, parts, strict=True))
        empty = [split for split, numbers in splits.items() if not len(numbers)]
        if empty:
            raise UserError(
                f"split_sizes is {[*self.sizes]}, which gives split {empty[0]} none of the "
                f"{len(classes)} classes of {data}; make it larger"
            )
        return splits

    @property
    def _are_shares(self) -> bool:
        return any(size % 1 != 0 for size in self.sizes)


@dataclass(frozen=True)
class SplitByName:
    """Assign the classes by lists of their names.

    Args:
        names: The names of each split's classes.

    Raises:
        UserError: A name is in two lists, or twice in one.
    """

    names: Mapping[Split, Sequence[str]]

    def __post_init__(self) -> None:
        first: dict[str, Split] = {}
        for split, names in self.names.items():
            for name in names:
                if name in first:
                    if first[name] == split:
                        raise UserError(f"{split}_classes contains {name!r} twice; name each class once")
                    raise UserError(
                        f"{split}_classes contains {name!r}, as {first[name]}_classes does; a class "
                        "belongs to one split"
                    )
                first[name] = split

    def assign(self, classes: Sequence[str], data: str) -> dict[Split, np.ndarray]:
        numbers = {name: number for number, name in enumerate(classes)}
        for split, names in self.names.items():
            unknown = [name for name in names if name not in numbers]
            if unknown:
                lower = {name.lower(): name for name in classes}
                close = difflib.get_close_matches(unknown[0].lower(), lower, n=1)
                hint = f"did you mean {lower[close[0]]!r}?" if close else f"it has {_few(classes)}"
                more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
                raise UserError(
                    f"{split}_classes contains {unknown[0]!r}{more}, which {data} does not have; {hint}"
                )
        return {
            split: np.array([numbers[name] for name in names]) for split, names in self.names.items()
        }


@dataclass(frozen=True)
class SplitByDataset:
    """Assign each class to the split whose data set it comes from; its name begins with the split."""

    def assign(self, classes: Sequence[str], data: str) -> dict[Split, np.ndarray]:
        parts = [name.partition("/") for name in classes]
        first: dict[str, str] = {}
        for split, _, name in parts:
            if name in first:
                raise UserError(
                    f"{split}_dataset has class {name!r}, as {first[name]}_dataset has; a class belongs "
                    "to one split"
                )
            first[name] = split
        return {split: np.flatnonzero([of == split for of, _, _ in parts]) for split in SPLITS}


def read_names(key: str, names: Sequence[str | int] | str | Path) -> list[str]:
    """Read a list of class names.

    Args:
        key: The argument that holds it, for error messages.
        names: The names; or a YAML file that holds a list of them, or a text file with one per line.

    Raises:
        UserError: The file cannot be read, or the list is empty or no list.
    """
    if not isinstance(names, str | Path):
        found: object = names
        where = key
    else:
        file = expand_home(Path(names), key)
        where = f"{key} {file}"
        try:
            text = file.read_text(encoding="utf-8")
            is_yaml = file.suffix in (".yaml", ".yml")
            found = yaml.safe_load(text) if is_yaml else [line.strip() for line in text.splitlines()]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(
                f"{where} cannot be read ({reason}); it must be a list of class names"
            ) from error
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise UserError(f"{where} is {type(found).__name__}; it must be a list of class names")
    cleaned = [str(name) for name in found if str(name).strip()]
    if not cleaned:
        raise UserError(f"{where} is empty; it must be a list of class names")
    return cleaned


def _few(classes: Sequence[str]) -> str:
    shown = ", ".join(map(repr, classes[:3]))
    return f"{shown} and {counted(len(classes) - 3, 'other')}" if len(classes) > 3 else shown
