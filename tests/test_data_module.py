"""Which tasks are seen never depends on devices, workers or where a run was resumed."""

import multiprocessing
import signal
import subprocess
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maml_pipeline import TaskBatch, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.signals import SIGNALS
from maml_pipeline.tasks import SineWaves
from tests.bad_inputs import UnpicklableLines


def on_device(rank: int = 0, world_size: int = 1, steps: int = 0, **settings: Any) -> TaskDataModule:
    data = TaskDataModule(SineWaves(shots=2), **({"meta_batch_size": 12} | settings))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        global_step=steps,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def joined(batches: list[TaskBatch]) -> TaskBatch:
    return TaskBatch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def same(a: TaskBatch, b: TaskBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_devices_share_the_tasks_of_every_meta_step(world_size: int) -> None:
    shares = [
        list(islice(on_device(rank, world_size).train_dataloader(), 3)) for rank in range(world_size)
    ]
    for step in range(3):
        whole = SineWaves(shots=2).batch(0, "train", range(12 * step, 12 * (step + 1)))
        assert same(joined([share[step] for share in shares]), whole)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tasks", [1, 12, 13, 30])
def test_devices_evaluate_every_task_once(world_size: int, tasks: int) -> None:
    loaders = [
        on_device(rank, world_size, test_tasks=tasks).test_dataloader() for rank in range(world_size)
    ]
    shares = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(share) for share in shares]
    seen = joined([batch for share in shares for batch in share])
    whole = SineWaves(shots=2).batch(0, "test", range(tasks))
    order, expected = seen.support_x[:, 0, 0].argsort(), whole.support_x[:, 0, 0].argsort()
    assert torch.equal(seen.query_y[order], whole.query_y[expected])


def test_a_resumed_run_continues_in_the_stream() -> None:
    whole = list(islice(on_device().train_dataloader(), 6))
    resumed = list(islice(on_device(steps=4).train_dataloader(), 2))
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))


@pytest.mark.integration
def test_workers_do_not_change_the_tasks() -> None:
    alone = list(islice(on_device().train_dataloader(), 5))
    with_workers = list(islice(on_device(num_workers=2).train_dataloader(), 5))
    assert all(same(a, b) for a, b in zip(alone, with_workers, strict=True))


@pytest.mark.integration
def test_workers_survive_signals_until_the_run_ends() -> None:
    # Slurm signals every process of a job, but the current meta-step must finish.
    stream = iter(on_device(num_workers=1).train_dataloader())
    drawn = [next(stream)]
    (worker,) = multiprocessing.active_children()
    for signum in SIGNALS:
        subprocess.run(["kill", f"-{signum.value}", str(worker.pid)], check=True)
    drawn += islice(stream, 9)
    assert worker.exitcode is None
    for step, batch in enumerate(drawn):
        assert same(batch, SineWaves(shots=2).batch(0, "train", range(12 * step, 12 * (step + 1))))
    del stream
    worker.join(timeout=60)
    assert not worker.is_alive()


@pytest.mark.integration
def test_workers_survive_signals_while_they_start() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = iter(on_device(num_workers=1).train_dataloader())
    (worker,) = multiprocessing.active_children()
    for signum in SIGNALS:
        subprocess.run(["kill", f"-{signum.value}", str(worker.pid)], check=True)
    assert same(next(stream), SineWaves(shots=2).batch(0, "train", range(12)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_the_seed_changes_only_training_tasks() -> None:
    one, other = on_device(seed=1), on_device(seed=2)
    assert not same(next(iter(one.train_dataloader())), next(iter(other.train_dataloader())))
    assert same(next(iter(one.val_dataloader())), next(iter(other.val_dataloader())))
    assert same(next(iter(one.test_dataloader())), next(iter(other.test_dataloader())))


def test_a_world_size_that_does_not_divide_the_meta_batch_is_rejected() -> None:
    with pytest.raises(UserError, match="meta_batch_size is 12, which 5 devices do not divide"):
        on_device(world_size=5).setup("fit")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("meta_batch_size", 0), ("val_tasks", 0), ("test_tasks", 0), ("num_workers", -1), ("seed", -1)],
)
def test_settings_out_of_range_are_rejected(setting: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{setting} is {value}"):
        TaskDataModule(SineWaves(), **{setting: value})


def test_tasks_that_cannot_be_pickled_are_rejected_before_workers_start() -> None:
    data = TaskDataModule(UnpicklableLines(), num_workers=2)
    for loader in (data.train_dataloader, data.val_dataloader):
        with pytest.raises(
            UserError, match=r"UnpicklableLines cannot be sent .* data\.num_workers to 0"
        ):
            loader()
    data.num_workers = 0
    assert next(iter(data.val_dataloader())).support_x.shape[0] == data.meta_batch_size
