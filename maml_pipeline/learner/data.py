"""Tasks as a LightningDataModule: the tasks of each meta-step, and each device's share."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any

from pytorch_lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maml_pipeline.errors import UserError
from maml_pipeline.learner.workers import check_picklable
from maml_pipeline.signals import SIGNALS
from maml_pipeline.tasks import Split, Task, TaskBatch, TaskDistribution
from maml_pipeline.tasks.checks import check_tasks, draw_batch
from maml_pipeline.tasks.task import check_at_least, type_name

EVALUATION_SEED = 0
SECONDS_TO_SERVE = 10


class TaskDataModule(LightningDataModule):
    """Draw meta-batches from a distribution of tasks.

    Meta-step s trains on tasks s * B to (s + 1) * B - 1, whatever the number of devices, however
    often the run was resumed, and however its meta-steps are divided into epochs. Validation and test
    tasks are the same for every run, so that runs with different seeds are compared on the same tasks.

    Args:
        tasks: The distribution.
        meta_batch_size: Tasks B of a meta-step over all devices; with `accumulate_grad_batches` of
            Lightning, a meta-step takes that many times B.
        val_tasks: Tasks of one validation.
        test_tasks: Tasks of the test.
        num_workers: Processes that draw tasks ahead, for each device; 0 draws them in the main one.
        seed: Seed of the training tasks; from the command line it is `seed_everything`.

    Raises:
        UserError: A number is out of its range, or the devices do not divide `meta_batch_size`.
    """

    def __init__(
        self,
        tasks: TaskDistribution,
        meta_batch_size: int = 32,
        val_tasks: int = 100,
        test_tasks: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(tasks, TaskDistribution):
            raise UserError(
                f"tasks is {type_name(tasks)}; it must be a TaskDistribution, whose task(seed, split, "
                "index) gives a task for every index: of a finite list, that of index % its length"
            )
        check_at_least("meta_batch_size", meta_batch_size, 1)
        check_at_least("val_tasks", val_tasks, 1)
        check_at_least("test_tasks", test_tasks, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("seed", seed, 0)
        self.tasks = tasks
        self.meta_batch_size = meta_batch_size
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.num_workers = num_workers
        self.seed = seed

    def prepare_data(self) -> None:
        """Download or convert data, once per node."""
        self.tasks.prepare()

    def setup(self, stage: str) -> None:
        """Refuse devices that do not divide the meta-batch, and intervals that split a meta-step.

        Raises:
            UserError: The trainer's settings do not fit.
        """
        self.check_devices(self.world_size)
        if self.trainer is not None and stage == "fit":
            check_meta_steps_are_whole(self.trainer)

    def check_devices(self, devices: int) -> None:
        """Refuse a number of devices that does not divide the meta-batch; may be called before a run.

        Raises:
            UserError: It does not.
        """
        if self.meta_batch_size % devices:
            raise UserError(
                f"meta_batch_size is {self.meta_batch_size}, which {devices} devices do not "
                "divide; each device takes an equal share of a meta-step's tasks"
            )

    def check_tasks(self, splits: Sequence[Split], train_batches: int) -> Task:
        """Draw the first and the last task of what a run takes; may be called before it.

        Args:
            splits: The splits that it draws from.
            train_batches: How many batches it trains on, where that is known, else 0.

        Returns:
            The first of them.

        Raises:
            UserError: The distribution does not keep its promises.
        """
        numbers = {
            "train": (self.seed, train_batches * self.meta_batch_size),
            "val": (EVALUATION_SEED, self.val_tasks),
            "test": (EVALUATION_SEED, self.test_tasks),
        }
        drawn = [
            check_tasks(self.tasks, seed, split, self.meta_batch_size, last=tasks - 1)
            for split in splits
            for seed, tasks in [numbers[split]]
        ]
        return drawn[0]

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def train_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw tasks endlessly, from the current meta-step whenever Lightning starts to iterate."""
        return self._loader("train", self.seed, self._next_training_task)

    def _next_training_task(self) -> int:
        if self.trainer is None:
            return 0
        batches_done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return int(batches_done * self.meta_batch_size)

    def val_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw every validation task once, over all devices."""
        return self._loader("val", EVALUATION_SEED, stop=self.val_tasks)

    def test_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw every test task once, over all devices."""
        return self._loader("test", EVALUATION_SEED, stop=self.test_tasks)

    def _loader(
        self, split: Split, seed: int, first_task: Callable[[], int] = int, stop: int | None = None
    ) -> DataLoader[TaskBatch]:
        stream = TaskStream(
            draw=partial(draw_batch, self.tasks, seed, split),
            batch_size=self.meta_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            stop=stop,
        )
        if self.num_workers:
            check_picklable(self.tasks)
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return TaskLoader(
            stream,
            first_task,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=on_cuda,
            # A fork beside the threads of gloo or W&B may inherit a lock that nobody gives back. A
            # process that starts afresh takes seconds, so it stays from one validation to the next.
            multiprocessing_context="spawn" if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_outlive_signals,
        )


def _outlive_signals(worker: int) -> None:
    """Keep a worker running for the current meta-step when a signal asks the run to stop.

    Slurm sends signals to all processes. A parent also ends its workers by SIGTERM, so SIGTERM ends them
    after a delay.
    """
    for signum in SIGNALS:
        signal.signal(signum, _end_later if signum == signal.SIGTERM else signal.SIG_IGN)


def _end_later(signum: int, frame: FrameType | None) -> None:
    timer = threading.Timer(SECONDS_TO_SERVE, os._exit, args=[0])
    timer.daemon = True
    timer.start()


class TaskStream(IterableDataset[TaskBatch]):
    """One device's share of consecutive batches of tasks.

    Batch b holds the tasks from `start + b * batch_size`, cut off at `stop`, and each device takes an
    equal part of it, or as nearly so as the last batch allows. Every device sees every batch, also
    one without a task for it, as T = 0 tasks: Lightning stops a run whose devices do not see equally
    many. An iterable dataset, so that Lightning does not put a sampler of its own between the two.
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
        # In memory shared with workers, which keep their copy of the stream from one epoch to the next.
        self.start = RawValue(ctypes.c_uint64, 0)
        self.stop = stop

    def __iter__(self) -> Iterator[TaskBatch]:
        # The loader collects from its workers in turn, so that every W-th batch is a worker's.
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
    """A loader that starts each iteration at the task that is due, also in workers that are running.

    Args:
        stream: What to draw.
        first_task: Called when an iteration starts; returns the index of its first task.
        settings: As for `DataLoader`.
    """

    def __init__(self, stream: TaskStream, first_task: Callable[[], int], **settings: Any) -> None:
        super().__init__(stream, **settings)
        self._stream = stream
        self._first_task = first_task

    def __iter__(self) -> Any:
        self._stream.start.value = self._first_task()
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position follows from the meta-steps. Lightning warns without this."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""


def check_meta_steps_are_whole(trainer: Trainer) -> None:
    """Refuse a trainer whose epochs or validations would end in the middle of a meta-step.

    Lightning counts both in batches, of which a meta-step has `accumulate_grad_batches`.

    Raises:
        UserError: One of them would.
    """
    batches = trainer.accumulate_grad_batches
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, int) and value % batches:
            raise UserError(
                f"trainer.{name} is {value} batches, which is no whole number of meta-steps: each has "
                f"accumulate_grad_batches = {batches} batches; name a multiple of {batches}"
            )
