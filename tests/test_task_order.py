"""Meta-step s trains on tasks s * B to (s + 1) * B - 1, regardless of epochs, workers and restarts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, Task, TaskDataModule, TaskDistribution
from maml_pipeline.errors import UserError
from maml_pipeline.learner.checkpoints import LastCheckpoint
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.tasks.task import Split
from tests.helpers import CONFIGS, RUN, assert_same_run, make_trainer

pytestmark = pytest.mark.integration

B = 3
META_STEPS = 14
STOPS = (1, 4, 5, 7, 10, 11)
"""At ends of epochs, at validations, and between them."""


class Numbered(TaskDistribution):
    """Tasks that contain their own index."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        number = torch.tensor([[float(index)]])
        return Task(number, number / 1e4, number, number / 1e4)


class Drawn(Callback):
    """Records the tasks of every batch, by meta-step."""

    def __init__(self) -> None:
        self.tasks: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, learner: Any, batch: Any, batch_idx: int) -> None:
        drawn = self.tasks.setdefault(trainer.global_step, [])
        drawn += [int(number) for number in batch.support_x[:, 0, 0]]


def fit(folder: Path, steps: int, workers: int = 0, **settings: Any) -> tuple[Drawn, MetaLearner]:
    """Train until meta-step `steps`, resuming from the folder's checkpoint if there is one."""
    drawn, last = Drawn(), folder / "last.ckpt"
    torch.manual_seed(0)
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=1e-6)
    trainer = make_trainer(
        enable_checkpointing=True,
        callbacks=[drawn, LastCheckpoint(folder / "last.ckpt", 100, StopOnSignal())],
        **({"check_val_every_n_epoch": None, "max_steps": steps} | settings),
    )
    data = TaskDataModule(Numbered(), B, val_tasks=2, num_workers=workers)
    resumed = last if last.exists() else None
    trainer.fit(learner, datamodule=data, ckpt_path=resumed, weights_only=True)
    return drawn, learner


def expected(steps: range, accumulate: int = 1) -> dict[int, list[int]]:
    of_step = accumulate * B
    return {step: list(range(step * of_step, (step + 1) * of_step)) for step in steps}


def same_weights(one: MetaLearner, other: MetaLearner) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


EPOCHS: dict[str, dict[str, Any]] = {
    "one endless epoch": {"val_check_interval": 5},
    "short epochs": {"limit_train_batches": 5, "val_check_interval": 7},
    "epochs of one batch": {"limit_train_batches": 1, "val_check_interval": 7},
    "validated after each epoch": {
        "limit_train_batches": 5,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
    },
    "validated every second epoch": {
        "limit_train_batches": 5,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 2,
    },
    "validated within epochs": {
        "limit_train_batches": 5,
        "val_check_interval": 2,
        "check_val_every_n_epoch": 1,
    },
    "reloaded": {
        "limit_train_batches": 4,
        "val_check_interval": 5,
        "reload_dataloaders_every_n_epochs": 1,
    },
    "reloaded every second epoch": {
        "limit_train_batches": 4,
        "val_check_interval": 5,
        "reload_dataloaders_every_n_epochs": 2,
    },
    "never validated": {"limit_train_batches": 5, "limit_val_batches": 0, "val_check_interval": 5},
}


@pytest.mark.parametrize("settings", EPOCHS.values(), ids=EPOCHS)
def test_every_task_is_drawn_once_and_in_order_even_after_resuming(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, learner = fit(tmp_path / "whole", META_STEPS, **settings)
    assert whole.tasks == expected(range(META_STEPS))
    for stop in STOPS:
        folder = tmp_path / str(stop)
        before, _ = fit(folder, stop, **settings)
        after, resumed = fit(folder, META_STEPS, **settings)
        assert before.tasks == expected(range(stop))
        assert after.tasks == expected(range(stop, META_STEPS))
        assert same_weights(learner, resumed)


def test_max_epochs_ends_a_run(tmp_path: Path) -> None:
    epochs = {"limit_train_batches": 5, "val_check_interval": 7, "max_epochs": 3}
    whole, learner = fit(tmp_path / "whole", -1, **epochs)
    assert whole.tasks == expected(range(15))
    for stop in STOPS:
        fit(tmp_path / str(stop), stop, **epochs)
        after, resumed = fit(tmp_path / str(stop), -1, **epochs)
        assert after.tasks == expected(range(stop, 15))
        assert same_weights(learner, resumed)
    # The final state is saved: nothing is left to train unless max_epochs grows.
    assert fit(tmp_path / "whole", -1, **epochs)[0].tasks == {}
    assert fit(tmp_path / "whole", -1, **epochs | {"max_epochs": 4})[0].tasks == expected(range(15, 20))


@pytest.mark.parametrize("limit", [{}, {"limit_train_batches": 4}])
def test_accumulated_batches_continue_in_the_stream(tmp_path: Path, limit: dict[str, Any]) -> None:
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 6, **limit}
    whole, learner = fit(tmp_path / "whole", META_STEPS, **settings)
    assert whole.tasks == expected(range(META_STEPS), accumulate=2)
    for stop in STOPS:
        fit(tmp_path / str(stop), stop, **settings)
        after, resumed = fit(tmp_path / str(stop), META_STEPS, **settings)
        assert after.tasks == expected(range(stop, META_STEPS), accumulate=2)
        assert same_weights(learner, resumed)


@pytest.mark.parametrize(("workers", "reload"), [(2, 0), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_workers_continue_in_the_stream_even_if_replaced(
    tmp_path: Path, workers: int, reload: int
) -> None:
    settings = {
        "limit_train_batches": 2,
        "val_check_interval": 5,
        "limit_val_batches": 0,
        "reload_dataloaders_every_n_epochs": reload,
    }
    drawn, _ = fit(tmp_path, 5, workers, **settings)
    assert drawn.tasks == expected(range(5))


def test_epochs_never_change_the_training(maml: Any, tmp_path: Path) -> None:
    run = (*RUN, "--trainer.max_steps", 13, "--trainer.val_check_interval", 4)
    maml(*run, "--run.dir", tmp_path / "one")
    maml(*run, "--trainer.limit_train_batches", 5, "--run.dir", tmp_path / "several")
    assert_same_run(tmp_path / "one", tmp_path / "several")


@pytest.mark.parametrize("name", ["limit_train_batches", "val_check_interval"])
def test_an_epoch_or_a_validation_within_a_meta_step_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"trainer.{name} is 3 batches.* give a multiple of 2$"):
        fit(tmp_path, 4, **{"val_check_interval": 2, "accumulate_grad_batches": 2, name: 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"limit_train_batches": 0.5},
            "limit_train_batches is 0.5, but an endless stream of tasks has no fraction",
        ),
        (
            {"limit_train_batches": 5, "accumulate_grad_batches": 2},
            "limit_train_batches is 5, which trainer.accumulate_grad_batches 2 does not divide",
        ),
        ({"max_epochs": 3, "max_steps": -1}, "max_epochs is 3, but the one epoch never ends"),
        ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch is 2, but the one epoch never ends"),
        (
            {"check_val_every_n_epoch": 1, "limit_train_batches": 5},
            "val_check_interval is 100, but with trainer.check_val_every_n_epoch 1 it counts within",
        ),
    ],
)
def test_invalid_epochs_are_rejected_before_the_run_folder_exists(
    maml_error: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    keys = [f"--trainer.{name}={value}" for name, value in settings.items()]
    assert message in maml_error("fit", "--config", CONFIGS / "toy.yaml", *keys)
    assert not list(tmp_path.iterdir())
