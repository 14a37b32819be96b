"""User-defined tasks are accepted, or rejected in one line before a run starts."""

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from maml_pipeline import Task, TaskBatch, TaskDataModule, TaskDistribution
from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Lines
from maml_pipeline.tasks.checks import check_distribution
from maml_pipeline.tasks.task import Split, draw_batch
from tests.helpers import CONFIGS

MY_TASKS = """
import torch
from maml_pipeline import Task, TaskDistribution
from maml_pipeline.tasks import Lines

class Changed(Lines):
    def task(self, seed, split, index):
        return self.change(super().task(seed, split, index), index)

class AsTuple(Changed):
    def change(self, task, index):
        return tuple(task)

class AsList(Changed):
    def change(self, task, index):
        return list(task)

class VaryingShots(Changed):
    def change(self, task, index):
        shots = 2 + index % 3
        return Task(task.support_x[:shots], task.support_y[:shots], task.query_x, task.query_y)

class ThreeTensors(Changed):
    def change(self, task, index):
        return tuple(task)[:3]

class Missing(Changed):
    def change(self, task, index):
        pass

class DictTask(Changed):
    def change(self, task, index):
        return task._asdict()

class DictInputs(Changed):
    def change(self, task, index):
        return task._replace(support_x={"x": task.support_x}, query_x={"x": task.query_x})

class Arrays(Changed):
    def change(self, task, index):
        return Task(*(tensor.numpy() for tensor in task))

class Doubles(Changed):
    def change(self, task, index):
        return Task(*(tensor.double() for tensor in task))

class DoublesAtTimes(Changed):
    def change(self, task, index):
        return Task(*(tensor.double() for tensor in task)) if index % 2 else task

class WholeNumbers(Changed):
    def change(self, task, index):
        return task._replace(support_x=task.support_x.long(), query_x=task.query_x.long())

class FewerTargets(Changed):
    def change(self, task, index):
        return task._replace(query_y=task.query_y[:-1])

class NoPoints(Changed):
    def change(self, task, index):
        return task._replace(support_x=task.support_x[:0], support_y=task.support_y[:0])

class NoPointDimension(Changed):
    def change(self, task, index):
        return task._replace(support_x=task.support_x[0, 0], support_y=task.support_y[0, 0])

class AlwaysAnother(Changed):
    def change(self, task, index):
        return task._replace(support_x=torch.randn(5, 1))

class Finite(TaskDistribution):
    def __init__(self, number=5):
        self.tasks = [Lines().task(0, "train", index) for index in range(number)]

    def task(self, seed, split, index):
        return self.tasks[index]

class FiniteByName(TaskDistribution):
    def task(self, seed, split, index):
        return {0: Lines().task(0, "train", 0)}[index]

class Repeating(Finite):
    def task(self, seed, split, index):
        return self.tasks[index % len(self.tasks)]

class Broken(TaskDistribution):
    def task(self, seed, split, index):
        return self.nothing

class NoBatch(Lines):
    def batch(self, seed, split, indices):
        pass

class BatchOfOne(Lines):
    def batch(self, seed, split, indices):
        return super().batch(seed, split, indices[:1])

class BatchOfOthers(Lines):
    def batch(self, seed, split, indices):
        return super().batch(seed, split, [index + 1 for index in indices])

class SmallBatchOfOthers(Lines):
    def task(self, seed, split, index):
        return Task(*(1e-6 * tensor for tensor in super().task(seed, split, index)))

    def batch(self, seed, split, indices):
        return super().batch(seed, split, [index + 1 for index in indices])

class BatchAsTask(Lines):
    def batch(self, seed, split, indices):
        return self.task(seed, split, indices[0])

class BatchOfArrays(Lines):
    def batch(self, seed, split, indices):
        return tuple(tensor.numpy() for tensor in super().batch(seed, split, indices))

class BatchAsTuple(Lines):
    def batch(self, seed, split, indices):
        return tuple(super().batch(seed, split, indices))
"""
TOY = [
    *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", "run"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.max_steps", 3, "--trainer.val_check_interval", 3),
    *("--data.val_tasks", 4, "--data.test_tasks", 4, "--data.meta_batch_size", 4),
    *("--probes.memory", "false", "--probes.speed", "false", "--probes.order_gap", "false"),
]


@pytest.fixture(autouse=True)
def _my_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_tasks.py").write_text(MY_TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)


def result(folder: Path) -> dict[str, float]:
    measured: dict[str, float] = json.loads((folder / "test.json").read_text())
    return measured


@pytest.mark.parametrize("tasks", ["AsTuple", "AsList", "BatchAsTuple"])
def test_tuples_and_lists_of_tensors_are_accepted(
    maml: Callable[..., str], tmp_path: Path, tasks: str
) -> None:
    maml(*TOY, "--run.dir", "lines")
    maml(*TOY, "--data.tasks", f"my_tasks.{tasks}")
    assert result(tmp_path / "run") == result(tmp_path / "lines")


def test_a_finite_list_may_repeat(maml: Callable[..., str], tmp_path: Path) -> None:
    maml(*TOY, "--data.tasks", "my_tasks.Repeating")
    assert result(tmp_path / "run")["test/loss"] > 0


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
def test_varying_shots_work_with_one_task_per_batch(
    maml: Callable[..., str], tmp_path: Path, engine: str
) -> None:
    one = ["--data.meta_batch_size", 1, "--trainer.accumulate_grad_batches", 4]
    maml(*TOY, "--data.tasks", "my_tasks.VaryingShots", *one, "--model.engine", engine)
    assert result(tmp_path / "run")["meta_step"] == 3


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            "VaryingShots",
            "tasks of one meta-batch differ: support_x is (2, 1) torch.float32 in one and (3, 1) "
            "torch.float32 in another; make them equal, or set data.meta_batch_size to 1 and "
            "trainer.accumulate_grad_batches to the number of tasks per meta-step",
        ),
        ("DoublesAtTimes", "support_x is (5, 1) torch.float32 in one and (5, 1) torch.float64 in"),
        ("ThreeTensors", "a task is tuple of 3; it must be Task(support_x, support_y, query_x"),
        ("Missing", "a task is NoneType; it must be Task(support_x"),
        ("DictTask", "a task is dict; it must be Task(support_x"),
        (
            "DictInputs",
            "support_x of a task is dict; it must be a tensor; concatenate several inputs into one",
        ),
        (
            "Arrays",
            "support_x of a task is ndarray; it must be a tensor; convert it with torch.from_numpy",
        ),
        ("Doubles", "support_x is (5, 1) float64 and support_y (5, 1) float64"),
        ("WholeNumbers", "support_x is (5, 1) int64 and support_y (5, 1) float32"),
        (
            "FewerTargets",
            "inputs of shape (10, 1) and targets of shape (9, 1); the first dimension of both",
        ),
        (
            "NoPoints",
            "inputs of shape (0, 1) and targets of shape (0, 1); the first dimension of both is",
        ),
        ("NoPointDimension", "inputs of shape () and targets of shape (); the first dimension of both"),
        ("AlwaysAnother", "of AlwaysAnother returns a different task on a second call; it must"),
        ("Finite", "task(0, 'train', 11) of Finite failed: list index out of range (my_tasks.py, line"),
        ("FiniteByName", "task(0, 'train', 11) of FiniteByName failed: KeyError: 11 (my_tasks.py, line"),
        ("Broken", "task(0, 'train', 0) of Broken failed: AttributeError: 'Broken' object has no attr"),
        ("NoBatch", "NoBatch.batch returns NoneType; it must return TaskBatch(support_x, support_y"),
        ("BatchOfOne", "support_x of BatchOfOne.batch is of shape (1, 5, 1); for 4 indices it must be"),
        (
            "BatchOfOthers",
            "BatchOfOthers.batch returns other tasks than BatchOfOthers.task for the same",
        ),
        ("SmallBatchOfOthers", "SmallBatchOfOthers.batch returns other tasks than SmallBatchOfOthers"),
        ("BatchAsTask", "support_x of BatchAsTask.batch is of shape (5, 1); for 4 indices it must be a"),
        ("BatchOfArrays", "support_x of BatchOfArrays.batch is ndarray; for 4 indices it must be a"),
    ],
)
def test_invalid_tasks_are_rejected_before_the_run_folder_exists(
    maml_error: Callable[..., str], tmp_path: Path, tasks: str, message: str
) -> None:
    assert message in maml_error(*TOY, "--data.tasks", f"my_tasks.{tasks}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [("train", 0), ("val", 0), ("val", 3), ("test", 0), ("test", 3)])
def test_every_split_that_a_run_uses_is_checked(first: tuple[Split, int]) -> None:
    class Holes(Lines):
        def task(self, seed: int, split: Split, index: int) -> Task:
            if (split, index) == first:
                raise ValueError("no such drawing")
            return super().task(seed, split, index)

    data = TaskDataModule(Holes(), meta_batch_size=2, val_tasks=4, test_tasks=4)
    with pytest.raises(UserError, match=rf"'{first[0]}', {first[1]}\) of Holes failed: no such drawing"):
        data.check_splits(["train", "val", "test"], train_batches=10)
    unaffected: list[Split] = [s for s in ("train", "val", "test") if s != first[0]]
    data.check_splits(unaffected, train_batches=10)


class EndsLate(Lines):
    """A list that ends during a run of unknown length."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        return [super(EndsLate, self).task(seed, split, i) for i in range(8)][index]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_a_list_that_ends_during_training_is_reported_from_any_process(workers: int) -> None:
    data = TaskDataModule(EndsLate(), meta_batch_size=4, num_workers=workers)
    data.check_splits(["train"], train_batches=0)
    loader: DataLoader[TaskBatch] = data.train_dataloader()
    with pytest.raises(UserError) as error:
        for _ in loader:
            pass
    assert str(error.value).startswith("task 8 to 11 of split train of EndsLate failed: list index out")
    assert len(str(error.value).splitlines()) == 1


def test_a_list_is_not_a_distribution() -> None:
    tasks: Any = [Lines().task(0, "train", 0)]
    with pytest.raises(UserError, match=r"tasks is list of 1; it must be a TaskDistribution.*index %"):
        TaskDataModule(tasks)


def test_only_part_of_a_large_meta_batch_is_checked() -> None:
    drawn: list[int] = []

    class Counting(Lines):
        def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
            drawn.append(len(indices))
            return super().batch(seed, split, indices)

    check_distribution(Counting(), 0, "train", tasks_per_batch=10**9, last=10**12)
    assert drawn == [64]


def test_tasks_may_contain_nan() -> None:
    class Unknown(Lines):
        def task(self, seed: int, split: Split, index: int) -> Task:
            task = super().task(seed, split, index)
            task.query_x[0] = torch.nan
            return task

    task = check_distribution(Unknown(), 0, "train", tasks_per_batch=2, last=5)
    assert task.query_x[0].isnan()


def test_a_task_batch_is_returned_without_a_copy() -> None:
    class Kept(TaskDistribution):
        tensors = tuple(torch.rand(3, 5, 1) for _ in range(4))

        def task(self, seed: int, split: Split, index: int) -> Task:
            return Task(*(tensor[index] for tensor in self.tensors))

        def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
            return TaskBatch(*self.tensors)

    batch = draw_batch(Kept(), 0, "train", range(3))
    assert all(a is b for a, b in zip(batch, Kept.tensors, strict=True))


def test_tasks_drawn_from_the_global_random_state_are_rejected() -> None:
    class Impure(TaskDistribution):
        def task(self, seed: int, split: Split, index: int) -> Task:
            x: Tensor = torch.full((3, 1), random.random())
            return Task(x, x, x, x)

    with pytest.raises(UserError, match=r"draw from random_generator\(seed, split, index\)"):
        check_distribution(Impure(), 0, "train", tasks_per_batch=1, last=0)
