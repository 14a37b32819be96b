"""The stream of tasks of one device, and the loader that iterates over it."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count
from multiprocessing.sharedctypes import RawValue
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maml_pipeline.learner.workers import signals_blocked
from maml_pipeline.tasks import TaskBatch


class TaskStream(IterableDataset[TaskBatch]):
    """One device's share of consecutive batches of tasks.

    Batch b holds the tasks from `start + b * batch_size`, up to `stop`, and is divided among the devices
    as equally as possible. Every device gets every batch, even with T = 0 tasks: Lightning stops a run
    whose devices get different numbers of batches. Iterable, so that Lightning adds no sampler.

    Args:
        draw: Draws the tasks with given indices as one batch.
        batch_size: Tasks of a batch over all devices.
        rank: This device.
        world_size: Number of devices.
        stop: End of the task indices; `None` for an endless stream.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[int]], TaskBatch],
        batch_size: int,
        rank: int,
        world_size: int,
        stop: int | None,
    ) -> None:
        self.draw = draw
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        # In memory shared with the workers, which keep their copy of the stream between epochs.
        self.start = RawValue(ctypes.c_uint64, 0)
        self.stop = stop

    def __iter__(self) -> Iterator[TaskBatch]:
        # The loader takes batches from its W workers in turn, so each worker draws every W-th batch.
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first_batch = self.start.value + worker * self.batch_size
        for start in count(first_batch, workers * self.batch_size):
            tasks = self.batch_size if self.stop is None else min(self.batch_size, self.stop - start)
            if tasks <= 0:
                return
            first, end = (tasks * rank // self.world_size for rank in (self.rank, self.rank + 1))
            if first < end:
                yield self.draw(range(start + first, start + end))
            else:
                yield TaskBatch(*(tensor[:0] for tensor in self.draw([start])))

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("an endless stream of tasks has no length")
        return -(-self.stop // self.batch_size)


class TaskLoader(DataLoader[TaskBatch]):
    """A loader whose iterations start at a given task, also in workers that are already running.

    Args:
        stream: The batches.
        first_task: Called at the start of each iteration; returns the index of its first task.
        settings: As for `DataLoader`.
    """

    def __init__(self, stream: TaskStream, first_task: Callable[[], int], **settings: Any) -> None:
        super().__init__(stream, **settings)
        self._stream = stream
        self._first_task = first_task

    def __iter__(self) -> Any:
        self._stream.start.value = self._first_task()
        # In this process, PyTorch's iterator adds nothing but its own time.
        if not (self.num_workers or self.pin_memory):
            return iter(self._stream)
        with signals_blocked() if self.num_workers else nullcontext():
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the meta-step determines the position. Lightning warns without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""
