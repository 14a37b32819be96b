"""A network's random numbers are a pure function of (seed, meta-step, batch, rank)."""

import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.learner.checkpoints import LastCheckpoint
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from maml_pipeline.tasks import SineWaves
from tests import world_size_runs as runs
from tests.helpers import RUN, checkpoint_tensors
from tests.ranks import on_every_rank

Numbers = tuple[float, ...]


def draw() -> Numbers:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def trainer(meta_step: int = 0, rank: int = 0) -> Any:
    return SimpleNamespace(global_step=meta_step, global_rank=rank, accumulate_grad_batches=2)


def batch(seed: int = 0, meta_step: int = 0, index: int = 0, rank: int = 0) -> Numbers:
    SeedRandomNumbers(seed).on_train_batch_start(trainer(meta_step, rank), None, None, index)  # type: ignore[arg-type]
    return draw()


def test_random_numbers_depend_on_seed_meta_step_batch_and_rank() -> None:
    keys = [*product((0, 1, 2**32 - 1), (0, 1, 500), (0, 1), (0, 1, 7))]
    drawn = [batch(*key) for key in keys]
    assert drawn == [batch(*key) for key in keys]
    for generator in zip(*drawn, strict=True):
        assert len(set(generator)) == len(keys)


def test_a_batch_counts_within_its_meta_step() -> None:
    # Batches of different epochs differ only by their meta-step.
    assert batch(meta_step=3, index=6) == batch(meta_step=3, index=0) != batch(meta_step=3, index=7)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_test_start"])
def test_an_evaluation_draws_the_same_each_time(hook: str) -> None:
    def evaluation(meta_step: int) -> Numbers:
        getattr(SeedRandomNumbers(0), hook)(trainer(meta_step), None)
        return draw()

    assert evaluation(0) == evaluation(100) != batch()


def test_validations_and_probes_do_not_change_what_training_draws(maml: Any, tmp_path: Any) -> None:
    dropping = ("--model.network", "tests.test_resume.Dropping", "--model.engine", "learn2learn")
    run = (*RUN, *dropping, "--trainer.max_steps", 20)
    often = ("--trainer.val_check_interval", 3, "--probes.every", 4)
    maml(*run, *often, "--run.dir", tmp_path / "often")
    maml(*run, "--trainer.val_check_interval", 20, "--run.dir", tmp_path / "once")
    one, other = checkpoint_tensors(tmp_path / "often"), checkpoint_tensors(tmp_path / "once")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def train_in_two_parts(folder: Path) -> dict[str, Any]:
    """Train a network with dropout on all ranks: at once, and in two parts."""
    return {"whole": fit(folder / "whole", 12), "parts": [fit(folder / "parts", n) for n in (7, 12)][-1]}


def fit(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01, engine="learn2learn")
    drawn = Drawn()
    callbacks = [SeedRandomNumbers(0), drawn, LastCheckpoint(folder / "last.ckpt", 100, StopOnSignal())]
    last = folder / "last.ckpt"
    runs.trainer(callbacks=callbacks, enable_checkpointing=True, max_steps=steps).fit(
        learner,
        datamodule=TaskDataModule(SineWaves(shots=5), 4),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return learner.network.state_dict() | {"drawn": torch.tensor(drawn.number)}


class Drawn(Callback):
    """Records the last number that this rank drew."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.number = float(torch.rand(()))


@pytest.mark.integration
@pytest.mark.slow
def test_every_rank_draws_different_numbers_and_resumes_exactly(tmp_path: Path) -> None:
    first, second = on_every_rank(train_in_two_parts, 2, tmp_path / "ranks", seconds=240)
    for rank in (first, second):
        assert all(torch.equal(value, rank["parts"][name]) for name, value in rank["whole"].items())
    assert first["whole"].pop("drawn") != second["whole"].pop("drawn")
    assert all(torch.equal(value, second["whole"][name]) for name, value in first["whole"].items())
