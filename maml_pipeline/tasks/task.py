"""A task, a batch of tasks, and the base class of task distributions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from maml_pipeline.errors import UserError, describe

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Task(NamedTuple):
    """One task: adapt to the support set, evaluate on the query set.

    Shapes: `support_x (S, ...)`, `support_y (S, ...)`, `query_x (Q, ...)`, `query_y (Q, ...)`, for S
    support and Q query points.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class TaskBatch(NamedTuple):
    """T tasks of equal shape, stacked.

    Shapes: `support_x (T, S, ...)`, `support_y (T, S, ...)`, `query_x (T, Q, ...)`,
    `query_y (T, Q, ...)`.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @classmethod
    def stack(cls, tasks: Iterable[Task]) -> "TaskBatch":
        """Stack tasks along a new leading dimension T.

        Raises:
            UserError: One of them is not a task, or they differ in shape or dtype.
        """
        columns = [*zip(*map(to_task, tasks), strict=True)]
        for name, tensors in zip(cls._fields, columns, strict=True):
            kinds = {(tuple(tensor.shape), str(tensor.dtype)): None for tensor in tensors}
            if len(kinds) > 1:
                (one, dtype), (other, other_dtype), *_ = kinds
                raise UserError(
                    f"tasks of one meta-batch differ: {name} is {one} {dtype} in one and {other} "
                    f"{other_dtype} in another; make them equal, or set data.meta_batch_size to 1 and "
                    "trainer.accumulate_grad_batches to the number of tasks per meta-step"
                )
        return cls(*map(torch.stack, columns))

    def to(self, device: torch.device) -> "TaskBatch":
        """Move the batch to a device; from pinned memory to a GPU, without waiting for it."""
        return TaskBatch(*(tensor.to(device, non_blocking=device.type == "cuda") for tensor in self))

    def tasks(self) -> Iterable[Task]:
        """Iterate over the T tasks, each a view of the batch."""
        return (Task(*tensors) for tensors in zip(*self, strict=True))


class TaskDistribution(ABC):
    """A distribution of tasks; each task is a pure function of (seed, split, index).

    The same three values give the same task on every machine, with every world size and worker, and
    after resuming. Subclass it and implement `task` to train on your own tasks; draw random numbers
    from `random_generator(seed, split, index)`. Tasks have equal shapes; if the number of shots varies,
    set the meta-batch size to 1 and accumulate gradients.
    """

    @cached_property
    def name(self) -> str:
        """Name in run folders and logs: the class name, with its ways and shots if it has them."""
        ways, shots = getattr(self, "ways", None), getattr(self, "shots", None)
        size = f"{ways}w" if isinstance(ways, int) else ""
        if isinstance(shots, int):
            size += f"{shots}s" if size else f"{shots}shot"
        name = type(self).__name__.lower()
        return f"{name}-{size}" if size else name

    def prepare(self) -> None:
        """Download or convert data; called once per node, before `task`. Does nothing by default."""
        return

    @abstractmethod
    def task(self, seed: int, split: Split, index: int) -> Task:
        """Return one task.

        Args:
            seed: Seed of the run, 0 to 2^64 - 1.
            split: Split that the task belongs to.
            index: Number of the task in the split: 0, 1, 2, ..., without an upper limit.
        """

    def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Return several tasks, stacked.

        Override it only for speed; `random_generators(seed, split, indices)` are the same generators.

        Args:
            seed: As in `task`.
            split: As in `task`.
            indices: Indices of the T tasks.
        """
        return TaskBatch.stack(self.task(seed, split, index) for index in indices)


def draw_batch(tasks: TaskDistribution, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
    """Draw a batch of tasks and check its shape.

    Args:
        tasks: The distribution.
        seed: Seed of the run.
        split: Split to draw from.
        indices: Indices of the T tasks.

    Returns:
        The batch, with a leading dimension T; a tuple or list of four tensors is converted.

    Raises:
        UserError: There is no task for an index, or `batch` returns anything but T tasks.
    """
    try:
        batch = tasks.batch(seed, split, indices)
    except (IndexError, StopIteration) as error:
        call = f"task {indices[0]} to {indices[-1]} of split {split}"
        raise UserError(call_error(tasks, call, error)) from error
    if not isinstance(batch, TaskBatch):
        if not isinstance(batch, tuple | list) or len(batch) != len(TaskBatch._fields):
            raise UserError(
                f"{type(tasks).__name__}.batch returns {type_name(batch)}; it must return "
                f"TaskBatch({', '.join(TaskBatch._fields)})"
            )
        batch = TaskBatch(*batch)
    for name, tensor in zip(batch._fields, batch, strict=True):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (len(indices),):
            actual = (
                f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type_name(tensor)
            )
            raise UserError(
                f"{name} of {type(tasks).__name__}.batch is {actual}; for {len(indices)} indices it "
                f"must be a tensor of shape ({len(indices)}, ...)"
            )
    return batch


def to_task(value: object) -> Task:
    """Convert a tuple or list of four tensors to a `Task`.

    Raises:
        UserError: The value is anything else.
    """
    if not isinstance(value, Task):
        if not isinstance(value, tuple | list) or len(value) != len(Task._fields):
            raise UserError(f"a task is {type_name(value)}; it must be Task({', '.join(Task._fields)})")
        value = Task(*value)
    for name, tensor in zip(Task._fields, value, strict=True):
        if not isinstance(tensor, Tensor):
            remedy = {
                np.ndarray: "; convert it with torch.from_numpy",
                dict: "; concatenate several inputs into one and split it in the network",
            }.get(type(tensor), "")
            raise UserError(f"{name} of a task is {type_name(tensor)}; it must be a tensor{remedy}")
    return value


def call_error(tasks: TaskDistribution, call: str, error: Exception) -> str:
    """Return a message for a failed call of a distribution; `call` is the call as text."""
    finite = isinstance(error, LookupError | StopIteration)
    remedy = "; every index from 0 needs a task: use index % number of tasks" if finite else ""
    return f"{call} of {type(tasks).__name__} failed: {describe(error)}{remedy}"


def type_name(value: object) -> str:
    """Name a value's type in an error message: `dict`, `list of 3`."""
    of = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{of}"


def float32_tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Convert arrays to float32 tensors."""
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays)
