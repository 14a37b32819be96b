"""Data sets of (image, class): building them, their class names, reading an image."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from maml_pipeline.environment import OFFLINE
from maml_pipeline.errors import UserError, describe
from maml_pipeline.tasks.image_pixels import to_8_bits, to_pixels
from maml_pipeline.tasks.task import type_name

DatasetBuilder = Callable[[], Dataset[Any]]
TORCHVISION_LOADERS = "torchvision.datasets.folder"
FILE_LISTS = ("samples", "imgs", "_samples", "_image_files", "_images")
"""Attributes in which torchvision's data sets list the files of their images."""


@dataclass(frozen=True)
class Source:
    """A built data set.

    Args:
        name: Its name in messages, such as `CIFAR100`.
        key: The argument that it comes from: `dataset`, or `train_dataset` and so on.
        dataset: The data set.
        prefix: What the names of its classes begin with.
    """

    name: str
    key: str
    dataset: Any
    prefix: str = ""

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def class_names(self) -> dict[int, str]:
        """Names of the classes by number: `class_to_idx` or `classes`; empty if it has neither."""
        numbers = getattr(self.dataset, "class_to_idx", None)
        if isinstance(numbers, Mapping):
            pairs = [(number, name) for name, number in numbers.items()]
        else:
            names = getattr(self.dataset, "classes", None)
            pairs = [*enumerate(names)] if isinstance(names, Sequence) else []
        return {int(number): self.prefix + str(name) for number, name in sorted(pairs)}

    def item(self, index: int, size: int, channels: int) -> tuple[np.ndarray, str]:
        """Read one image.

        Args:
            index: Its index.
            size: As for `to_pixels`.
            channels: As for `to_pixels`.

        Returns:
            uint8 `(channels, size, size)`, and the name of its class.

        Raises:
            UserError: It cannot be read, or is not (image, class).
        """
        try:
            item = self.dataset[index]
        except Exception as error:  # the user's code or a damaged file may raise anything
            raise UserError(f"{self._place(index)} cannot be read: {describe(error)}") from error
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise UserError(f"{self._place(index)} is {type_name(item)}; an item must be (image, class)")
        try:
            return to_pixels(item[0], size, channels), self._class_name(item[1])
        except ValueError as error:
            raise UserError(f"{self._place(index)} {error}") from error

    def _class_name(self, label: Any) -> str:
        if isinstance(label, str):
            return self.prefix + label
        if isinstance(label, Tensor | np.ndarray) and math.prod(label.shape) == 1:
            label = label.item()
        if not isinstance(label, int | np.integer):
            raise ValueError(f"has class {type_name(label)}; a class must be a whole number or a name")
        number = int(label)
        return self.class_names.get(number, f"{self.prefix}{number}")

    def _place(self, index: int) -> str:
        for name in FILE_LISTS:
            files = getattr(self.dataset, name, None)
            if isinstance(files, Sequence) and index < len(files):
                entry = files[index]
                file = entry[0] if isinstance(entry, tuple | list) and entry else entry
                if isinstance(file, str | Path):
                    return f"{self.key} {self.name}: {file}"
        return f"{self.key} {self.name}: image {index}"


def build(builder: DatasetBuilder, key: str, prefix: str = "", **arguments: Any) -> Source:
    """Build a data set.

    Args:
        builder: Returns the data set.
        key: The argument that holds it, for error messages.
        prefix: As for `Source`.
        arguments: Passed to the builder.

    Raises:
        UserError: It cannot be built, or is not a map-style data set.
    """
    name = builder_name(builder)
    is_refused = bool(downloads(builder) and OFFLINE.get())
    if is_refused:
        arguments |= {"download": False}
    try:
        dataset = builder(**arguments)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"{type_name(dataset)} is not a map-style data set, dataset[i]")
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError("it has no images")
    except Exception as error:  # the user's code may raise anything
        remedy = ""
        if is_refused:
            remedy = (
                f"; Slurm jobs and runs with {OFFLINE.name} set download nothing, so run `maml prepare "
                "--config FILE` first"
            )
        raise UserError(f"{key} {name} cannot be built: {describe(error)}{remedy}") from error
    loader = getattr(dataset, "loader", None)
    if getattr(loader, "__module__", None) == TORCHVISION_LOADERS:
        dataset.loader = _open_image  # type: ignore[attr-defined]
    return Source(name, key, dataset, prefix)


def _open_image(path: str) -> Image.Image:
    """Read a picture as torchvision's loader does, but with 16 bits and transparency converted."""
    with Image.open(path) as image:
        return to_8_bits(image).convert("RGB")


def downloads(builder: DatasetBuilder) -> bool:
    """Tell whether a builder was told to download its data set."""
    return isinstance(builder, partial) and bool(builder.keywords.get("download"))


def builder_name(builder: DatasetBuilder) -> str:
    """Return the name of the class or function that builds a data set."""
    return str(getattr(_built_class(builder), "__name__", type(builder).__name__))


def experiment_name(builder: DatasetBuilder) -> str:
    """Return the name of a data set for run folders: its class's; a folder of images is named by it."""
    built = _built_class(builder)
    name = builder_name(builder).lower()
    if inspect.isclass(built) and "DatasetFolder" in {base.__name__ for base in built.__mro__}:
        root = inspect.signature(built).bind_partial(*_arguments(builder), **_keywords(builder))
        folder = Path(str(root.arguments.get("root", name)))
        name = folder.name if folder.name not in ("train", "val", "test") else folder.parent.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "images"


def _built_class(builder: Any) -> Any:
    """Return the class or function that a partial calls; jsonargparse's partials pass on a class."""
    if not isinstance(builder, partial):
        return builder
    return next((one for one in builder.args if inspect.isclass(one)), builder.func)


def _arguments(builder: Any) -> tuple[Any, ...]:
    arguments = builder.args if isinstance(builder, partial) else ()
    return tuple(one for one in arguments if not callable(one))


def _keywords(builder: Any) -> dict[str, Any]:
    return dict(builder.keywords) if isinstance(builder, partial) else {}
