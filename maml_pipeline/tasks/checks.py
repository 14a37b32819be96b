"""Whether a distribution keeps its promises: checked on a few tasks, before a run begins."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from maml_pipeline.errors import UserError, describe
from maml_pipeline.tasks.task import Split, Task, TaskBatch, TaskDistribution, to_task, type_name

MOST_TASKS = 64
T = TypeVar("T")


def draw_batch(tasks: TaskDistribution, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
    """Return a batch of tasks, as one.

    Raises:
        UserError: There is no such task, or what `batch` returns is not a batch of so many.
    """
    try:
        batch = tasks.batch(seed, split, indices)
    except (IndexError, StopIteration) as error:
        call = f"task {indices[0]} to {indices[-1]} of split {split}"
        raise UserError(_failed(tasks, call, error)) from error
    if not isinstance(batch, TaskBatch):
        if not isinstance(batch, tuple | list) or len(batch) != len(TaskBatch._fields):
            raise UserError(
                f"{type(tasks).__name__}.batch returns {type_name(batch)}; it must return "
                f"TaskBatch({', '.join(TaskBatch._fields)})"
            )
        batch = TaskBatch(*batch)
    for name, tensor in zip(batch._fields, batch, strict=True):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != (len(indices),):
            kind = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type_name(tensor)
            raise UserError(
                f"{name} of {type(tasks).__name__}.batch is {kind}; for {len(indices)} indices it must "
                f"be a tensor of shape ({len(indices)}, ...)"
            )
    return batch


def check_tasks(
    tasks: TaskDistribution, seed: int, split: Split, tasks_per_batch: int, last: int
) -> Task:
    """Draw the first tasks of a split, and the last one that is needed.

    Args:
        tasks: The distribution.
        seed: Its seed.
        split: Which of the three splits.
        tasks_per_batch: How many tasks share a batch.
        last: Index of the last task.

    Returns:
        Task 0.

    Raises:
        UserError: `task` or `batch` fail, return something else, or contradict each other.
    """
    name = type(tasks).__name__

    def task(index: int) -> Task:
        call = f"task({seed}, {split!r}, {index})"
        return to_task(_try(tasks, call, lambda: tasks.task(seed, split, index)))

    first, again = task(0), task(0)
    for x, y in ((first.support_x, first.support_y), (first.query_x, first.query_y)):
        if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
            raise UserError(
                f"a set of {name} has inputs of shape {tuple(x.shape)} and targets of shape "
                f"{tuple(y.shape)}; both begin with the number of its points, which is at least 1"
            )
    if not _alike(first, again, tolerance=0):
        raise UserError(
            f"task(seed, split, index) of {name} returns another task when it is called again; it must "
            "depend on the three numbers alone: draw from random_generator(seed, split, index)"
        )
    task(max(last, 0))

    indices = range(min(tasks_per_batch, MOST_TASKS))
    batch = _try(
        tasks, f"batch({seed}, {split!r}, {indices})", lambda: draw_batch(tasks, seed, split, indices)
    )
    if not _alike(next(iter(batch.tasks())), first, tolerance=1e-3):
        raise UserError(
            f"{name}.batch does not return the tasks that {name}.task does; it must return those with "
            "the same indices, side by side"
        )
    return first


def _try(tasks: TaskDistribution, call: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except UserError:
        raise
    except Exception as error:  # whatever a user's own code may raise
        raise UserError(_failed(tasks, call, error)) from error


def _failed(tasks: TaskDistribution, call: str, error: Exception) -> str:
    finite = isinstance(error, LookupError | StopIteration)
    remedy = "; there must be one for every index from 0, such as index % their number" if finite else ""
    return f"{call} of {type(tasks).__name__} failed: {describe(error)}{remedy}"


def _alike(one: Task, other: Task, tolerance: float) -> bool:
    return all(_close(a, b, tolerance) for a, b in zip(one, other, strict=True))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = b.nan_to_num(0, 0, 0).abs().max().item()  # of the values: that of one may be zero
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
