"""What a network draws at random is a pure function of seed, meta-step, batch and rank."""

import random
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from tests.test_resume import RUN, checkpoint

Drawn = tuple[float, ...]


def draw() -> Drawn:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def trainer(meta_step: int = 0, rank: int = 0) -> Any:
    return SimpleNamespace(global_step=meta_step, global_rank=rank, accumulate_grad_batches=2)


def batch(seed: int = 0, meta_step: int = 0, index: int = 0, rank: int = 0) -> Drawn:
    SeedRandomNumbers(seed).on_train_batch_start(trainer(meta_step, rank), None, None, index)  # type: ignore[arg-type]
    return draw()


def test_the_same_batch_draws_the_same_and_every_other_batch_something_else() -> None:
    keys = [*product((0, 1, 2**32 - 1), (0, 1, 500), (0, 1), (0, 1, 7))]
    drawn = [batch(*key) for key in keys]
    assert drawn == [batch(*key) for key in keys]
    for generator in zip(*drawn, strict=True):
        assert len(set(generator)) == len(keys)


def test_a_batch_counts_within_its_meta_step() -> None:
    # An epoch's first batches and a later epoch's are told apart by the meta-step alone.
    assert batch(meta_step=3, index=6) == batch(meta_step=3, index=0) != batch(meta_step=3, index=7)


@pytest.mark.parametrize("hook", ["on_validation_start", "on_test_start"])
def test_an_evaluation_draws_the_same_each_time(hook: str) -> None:
    def evaluation(meta_step: int) -> Drawn:
        getattr(SeedRandomNumbers(0), hook)(trainer(meta_step), None)
        return draw()

    assert evaluation(0) == evaluation(100) != batch()


def test_validations_and_probes_do_not_change_what_training_draws(maml: Any, tmp_path: Any) -> None:
    run = (*RUN, "--trainer.max_steps", 20, "--model.network", "tests.test_resume.Dropping")
    often = ("--trainer.val_check_interval", 3, "--probes.every", 4)
    maml(*run, *often, "--run.dir", tmp_path / "often")
    maml(*run, "--trainer.val_check_interval", 20, "--run.dir", tmp_path / "once")
    one, other = checkpoint(tmp_path / "often"), checkpoint(tmp_path / "once")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
