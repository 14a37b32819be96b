"""Tasks as a LightningDataModule: which tasks each meta-step and each evaluation take."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from maml_pipeline.errors import UserError
from maml_pipeline.learner.task_stream import TaskLoader, TaskStream
from maml_pipeline.learner.workers import check_picklable, outlive_signals
from maml_pipeline.limits import check_at_least
from maml_pipeline.tasks import Split, Task, TaskBatch, TaskDistribution
from maml_pipeline.tasks.checks import check_distribution
from maml_pipeline.tasks.task import draw_batch, type_name

EVALUATION_SEED = 0
"""Seed of validation and test tasks, equal in all runs."""

MISLEADING_WARNINGS = (
    "The '.*_dataloader' does not have many workers",  # drawing tasks is faster than learning from them
    "Your `IterableDataset` has `__len__` defined",  # exact here for any number of workers
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own use of PyTorch
)
"""Patterns of warnings of Lightning that do not hold for these loaders."""


class TaskDataModule(LightningDataModule):
    """Draw meta-batches from a distribution of tasks.

    Meta-step s trains on tasks s * B to (s + 1) * B - 1, regardless of the number of devices, of
    resuming, and of epochs. Validation and test tasks are the same in every run, so that runs with
    different seeds are compared on the same tasks.

    Args:
        tasks: The distribution.
        meta_batch_size: Number of tasks B in a meta-step, over all devices. With Lightning's
            `accumulate_grad_batches`, a meta-step takes that many times B tasks.
        val_tasks: Number of tasks in a validation.
        test_tasks: Number of tasks in the test.
        num_workers: Number of processes per device that draw tasks ahead; 0 to draw them in the main
            process.
        seed: Seed of the training tasks; on the command line, `seed_everything`.

    Raises:
        UserError: A setting is out of range.
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
                "index) returns a task for every index; for a finite list, return item index % len(list)"
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
        """Reject trainer settings that would split a meta-batch unequally, or a meta-step.

        Hides Lightning's warnings that do not hold for these loaders.

        Raises:
            UserError: The number of devices or an interval does not fit.
        """
        for message in MISLEADING_WARNINGS:
            warnings.filterwarnings("ignore", message)
        self.check_devices(self.world_size)
        if self.trainer is not None and stage == "fit":
            check_meta_steps_are_whole(self.trainer)

    def check_devices(self, devices: int) -> None:
        """Check that a number of devices divides the meta-batch; may be called before a run.

        Raises:
            UserError: It does not.
        """
        if self.meta_batch_size % devices:
            raise UserError(
                f"data.meta_batch_size is {self.meta_batch_size}, which {devices} devices do not "
                "divide; each device takes an equal share of a meta-step's tasks"
            )

    def check_splits(self, splits: Sequence[Split], train_batches: int) -> Task:
        """Draw and check the first and the last task that a run will take from each split.

        Args:
            splits: The splits that the run draws from.
            train_batches: Number of training batches; 0 if unknown.

        Returns:
            The first task of the first split.

        Raises:
            UserError: A task is invalid, or not a pure function of (seed, split, index).
        """
        numbers = {
            "train": (self.seed, train_batches * self.meta_batch_size),
            "val": (EVALUATION_SEED, self.val_tasks),
            "test": (EVALUATION_SEED, self.test_tasks),
        }
        drawn = [
            check_distribution(self.tasks, seed, split, self.meta_batch_size, last=tasks - 1)
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

    def transfer_batch_to_device(
        self, batch: TaskBatch, device: torch.device, dataloader_idx: int
    ) -> TaskBatch:
        """Move a batch; Lightning would first search it for tensors."""
        return batch.to(device)

    def train_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw tasks endlessly; each iteration starts at the current meta-step."""
        return self._loader("train", self.seed, self._next_training_task)

    def _next_training_task(self) -> int:
        if self.trainer is None:
            return 0
        batches_done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return int(batches_done * self.meta_batch_size)

    def val_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw every validation task once, divided among the devices."""
        return self._loader("val", EVALUATION_SEED, stop=self.val_tasks)

    def test_dataloader(self) -> DataLoader[TaskBatch]:
        """Draw every test task once, divided among the devices."""
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
            # A fork beside the threads of gloo or W&B may inherit a lock that is never released. Spawned
            # processes take seconds to start, so they persist between validations.
            multiprocessing_context="spawn" if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=outlive_signals,
        )


def check_meta_steps_are_whole(trainer: Trainer) -> None:
    """Check that epochs and validations do not end in the middle of a meta-step.

    Lightning counts both in batches, and a meta-step has `accumulate_grad_batches` of them.

    Raises:
        UserError: One of them does.
    """
    batches = trainer.accumulate_grad_batches
    for name in ("limit_train_batches", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, int) and value % batches:
            raise UserError(
                f"trainer.{name} is {value} batches, not a whole number of meta-steps: each has "
                f"accumulate_grad_batches = {batches} batches; give a multiple of {batches}"
            )
