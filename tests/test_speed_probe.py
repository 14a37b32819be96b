"""The speed probe counts the floating-point operations of a meta-step."""

import time
from itertools import pairwise
from typing import Any

import pytest
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import Lines, SineWaves
from tests.probed_training import ENGINES, ORDERS, train


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_flops_match_a_count_by_hand(engine: Any) -> None:
    """A layer with n inputs and m outputs takes 2nm forward, 2nm for its weights, 2nm for its inputs.

    The first layer needs no gradient for its inputs.
    """
    widths, shots, tasks, steps = (1, 40, 40, 1), 10, 3, 2
    products = [n * m for n, m in pairwise(widths)]
    forward_and_backward = 2 * shots * (3 * sum(products) - products[0])
    settings = {"inner_steps": steps, "engine": engine, "first_order": True}
    learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, **settings)
    figures = train(
        *(learner, SineWaves(shots=shots), ProbeSettings(memory=False, order_gap=False)),
        meta_batch_size=tasks,
    )[9]
    assert figures["speed/meta_step_flops"] == tasks * (steps + 1) * forward_and_backward


def test_second_order_takes_more_flops_and_checkpointing_more_again() -> None:
    def flops(order: str) -> float:
        settings = {"inner_steps": 3, "engine": "vectorized", **ORDERS[order]}
        learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, **settings)
        return train(learner, SineWaves(), ProbeSettings(memory=False, order_gap=False))[9][
            "speed/meta_step_flops"
        ]

    assert flops("first") < flops("second") < flops("checkpointed")


def test_rates_follow_from_the_time_of_a_meta_step() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(
        *(learner, Lines(), ProbeSettings(memory=False, order_gap=False)),
        meta_batch_size=5,
        accumulate_grad_batches=2,
    )[9]
    seconds = figures["speed/meta_step_ms"] / 1e3
    assert seconds > 0
    assert figures["speed/tasks_per_second"] == pytest.approx(5 * 2 / seconds)
    flops = figures["speed/meta_step_flops"]
    assert figures["speed/flops_per_second"] == pytest.approx(flops / seconds)


def test_the_time_is_that_of_the_order_of_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenth meta-step is probed: four meta-steps in first order are timed, then two in second."""
    waited, training_step, clock = 0.0, MetaLearner.training_step, time.perf_counter

    def wait(learner: MetaLearner, *batch: Any) -> Any:
        nonlocal waited
        waited += 1 if learner.takes_first_order() else 100
        return training_step(learner, *batch)

    monkeypatch.setattr(MetaLearner, "training_step", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited)
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1, first_order_meta_steps=7)
    figures = train(learner, Lines(), ProbeSettings(memory=False, order_gap=False))[9]
    assert figures["speed/meta_step_ms"] == pytest.approx(100e3, rel=0.01)
