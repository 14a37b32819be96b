"""What a task is, what a batch of tasks is, and what every distribution of tasks promises."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from maml_pipeline.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Task(NamedTuple):
    """One task: adapt on the support set, be judged on the query set.

    `support_x (S, ...)`, `support_y (S, ...)`, `query_x (Q, ...)`, `query_y (Q, ...)`.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor


class TaskBatch(NamedTuple):
    """T tasks of equal shape.

    `support_x (T, S, ...)`, `support_y (T, S, ...)`, `query_x (T, Q, ...)`, `query_y (T, Q, ...)`.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    @classmethod
    def stack(cls, tasks: Iterable[Task]) -> "TaskBatch":
        """Put tasks side by side along a new leading dimension T.

        Raises:
            UserError: One of them is not a task, or they differ in shape or type.
        """
        columns = [*zip(*map(to_task, tasks), strict=True)]
        for name, tensors in zip(cls._fields, columns, strict=True):
            kinds = {(tuple(tensor.shape), str(tensor.dtype)): None for tensor in tensors}
            if len(kinds) > 1:
                (one, dtype), (other, other_dtype), *_ = kinds
                raise UserError(
                    f"tasks of one meta-batch differ: {name} is {one} {dtype} in one and {other} "
                    f"{other_dtype} in another; make them alike, or set data.meta_batch_size to 1 "
                    "and trainer.accumulate_grad_batches to the number of tasks of a meta-step"
                )
        return cls(*map(torch.stack, columns))

    def tasks(self) -> Iterable[Task]:
        """Iterate over the T tasks; each is a view of the batch."""
        return (Task(*tensors) for tensors in zip(*self, strict=True))


class TaskDistribution(ABC):
    """A distribution of tasks, each a pure function of (seed, split, index).

    Whatever the machine, world size, worker or resumed run, the same three numbers give the same
    task. Subclass it to bring tasks of your own. All tasks have the same shapes; where the number of
    shots varies, train with a meta-batch size of 1 and accumulate gradients over tasks.
    """

    @cached_property
    def name(self) -> str:
        """What runs on these tasks are called: the class with its ways and shots, where it has any."""
        ways, shots = getattr(self, "ways", None), getattr(self, "shots", None)
        size = f"{ways}w" if isinstance(ways, int) else ""
        if isinstance(shots, int):
            size += f"{shots}s" if size else f"{shots}shot"
        name = type(self).__name__.lower()
        return f"{name}-{size}" if size else name

    def prepare(self) -> None:
        """Fetch or convert what is needed on disk; called once per node, before any `task`."""
        return

    @abstractmethod
    def task(self, seed: int, split: Split, index: int) -> Task:
        """Return task `index` (0, 1, 2, ... without end) of `split` under `seed`."""

    def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Return the tasks with these indices side by side; override it only for speed."""
        return TaskBatch.stack(self.task(seed, split, index) for index in indices)


def to_task(value: object) -> Task:
    """Return a task; a tuple or list of its four tensors is one, too.

    Raises:
        UserError: It is anything else.
    """
    if not isinstance(value, Task):
        if not isinstance(value, tuple | list) or len(value) != len(Task._fields):
            raise UserError(f"a task is {type_name(value)}; it must be Task({', '.join(Task._fields)})")
        value = Task(*value)
    for name, tensor in zip(Task._fields, value, strict=True):
        if not isinstance(tensor, Tensor):
            remedy = {
                np.ndarray: "; torch.from_numpy makes one of it",
                dict: "; put several inputs into one, side by side, and let the network take it apart",
            }.get(type(tensor), "")
            raise UserError(f"{name} of a task is {type_name(tensor)}; it must be a tensor{remedy}")
    return value


def type_name(value: object) -> str:
    """Name a value's type for a message: `dict`, `list of 3`."""
    of = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{type(value).__name__}{of}"


def random_generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """Return the random numbers that belong to one task and to no other.

    Philox is counter-based: the key holds the seed and the split, the counter starts at a block of
    2^128 numbers of the task's own, so that no state passes from one task to the next.

    Args:
        seed: Any integer from 0 to 2^64 - 1.
        split: Which of the three splits.
        index: Which task, from 0 to 2^64 - 1.

    References:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def float32_tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Round float64 arrays to float32 tensors."""
    return tuple(torch.from_numpy(array.astype(np.float32)) for array in arrays)


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise a `UserError` that names the setting when it is below its minimum (or not a number)."""
    if not value >= minimum:
        raise UserError(f"{name} is {value}; it must be at least {minimum}")
