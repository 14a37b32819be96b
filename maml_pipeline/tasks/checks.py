"""Check a task distribution on a few tasks before a run starts."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.task import Split, Task, TaskDistribution, call_error, draw_batch, to_task

MAX_BATCH = 64
"""Tasks of the largest meta-batch that is drawn as a check."""
T = TypeVar("T")


def check_distribution(
    tasks: TaskDistribution, seed: int, split: Split, tasks_per_batch: int, last: int
) -> Task:
    """Check that tasks exist, are pure functions of (seed, split, index), and stack into batches.

    Draws task 0 twice, the last task, and one batch.

    Args:
        tasks: The distribution.
        seed: Seed of the run.
        split: Split to draw from.
        tasks_per_batch: Number of tasks in a batch.
        last: Index of the last task that the run needs.

    Returns:
        Task 0.

    Raises:
        UserError: `task` or `batch` fails, returns something else, or the two contradict each other.
    """
    name = type(tasks).__name__

    def task(index: int) -> Task:
        call = f"task({seed}, {split!r}, {index})"
        return to_task(_try(tasks, call, lambda: tasks.task(seed, split, index)))

    first, again = task(0), task(0)
    for x, y in ((first.support_x, first.support_y), (first.query_x, first.query_y)):
        if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
            raise UserError(
                f"a task of {name} has inputs of shape {tuple(x.shape)} and targets of shape "
                f"{tuple(y.shape)}; the first dimension of both is the number of points, at least 1"
            )
    if not _tasks_are_close(first, again, tolerance=0):
        raise UserError(
            f"task(seed, split, index) of {name} returns a different task on a second call; it must "
            "depend on its arguments only: draw from random_generator(seed, split, index)"
        )
    task(max(last, 0))

    indices = range(min(tasks_per_batch, MAX_BATCH))
    batch = _try(
        tasks, f"batch({seed}, {split!r}, {indices})", lambda: draw_batch(tasks, seed, split, indices)
    )
    if not _tasks_are_close(next(iter(batch.tasks())), first, tolerance=1e-3):
        raise UserError(
            f"{name}.batch returns other tasks than {name}.task for the same indices; it must return "
            "the same tasks, stacked"
        )
    return first


def _try(tasks: TaskDistribution, call: str, function: Callable[[], T]) -> T:
    try:
        return function()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(call_error(tasks, call, error)) from error


def _tasks_are_close(one: Task, other: Task, tolerance: float) -> bool:
    return all(_tensors_are_close(a, b, tolerance) for a, b in zip(one, other, strict=True))


def _tensors_are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = b.nan_to_num(0, 0, 0).abs().max().item()  # of all values, because single values may be zero
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
