"""The order gap equals its closed form and does not depend on the training method."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient
from maml_pipeline.meta_gradient.order_gap import order_gaps
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import Lines, SineWaves, Task
from maml_pipeline.tasks.task import Split
from tests.probed_training import ENGINES, ORDERS, train


def test_the_order_gap_equals_the_closed_form() -> None:
    """Compare the gap of the tenth meta-step in float64."""
    before: dict[int, Tensor] = {}

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            before.setdefault(learner.global_step, nn.utils.parameters_to_vector(self.parameters()))
            before[learner.global_step] = before[learner.global_step].detach().clone()
            return super().forward(x)

    class DoubleLines(Lines):
        def task(self, seed: int, split: Split, index: int) -> Task:
            return Task(*(tensor.double() for tensor in super().task(seed, split, index)))

    learner = MetaLearner(Linear(1, 1).double(), loss=mse_loss, inner_lr=0.1, inner_steps=3)
    figures = train(
        *(learner, DoubleLines(), ProbeSettings(memory=False, speed=False)), meta_batch_size=4
    )[9]
    gradients = [
        torch.stack(
            [
                linear_meta_gradient(before[9], DoubleLines().task(0, "train", i), inner)
                for i in range(9 * 4, 10 * 4)
            ]
        ).mean(dim=0)
        for inner in (replace(learner.inner, first_order=order) for order in (True, False))
    ]
    first, second = gradients
    norms = first.norm() * second.norm()
    assert figures["order_gap/cosine"] == pytest.approx((first @ second / norms).item(), rel=1e-12)
    assert figures["order_gap/norm_ratio"] == pytest.approx(
        (first.norm() / second.norm()).item(), rel=1e-12
    )
    error = (first - second).norm() / second.norm()
    assert figures["order_gap/relative_error"] == pytest.approx(error.item(), rel=1e-11)
    assert error > 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ORDERS)
def test_without_inner_steps_there_is_no_gap(order: str, engine: Any) -> None:
    learner = MetaLearner(
        MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=0, engine=engine, **ORDERS[order]
    )
    figures = train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]
    overall = {name.removeprefix("order_gap/"): value for name, value in figures.items()}
    assert overall["cosine"] == pytest.approx(1, abs=1e-12)
    assert overall["norm_ratio"] == 1 and overall["relative_error"] == 0


def test_each_layer_has_its_own_cosine() -> None:
    learner = MetaLearner(
        nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), loss=mse_loss, inner_lr=0.05
    )
    figures = train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]
    cosines = {name for name in figures if name.startswith("order_gap/cosine")}
    assert cosines == {"order_gap/cosine", "order_gap/cosine/0", "order_gap/cosine/2"}


def test_the_order_gap_does_not_depend_on_the_training_method() -> None:
    def gap(order: str) -> dict[str, float]:
        torch.manual_seed(0)
        learner = MetaLearner(
            MLP(), loss=mse_loss, inner_lr=0.01, optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            **ORDERS[order],
        )  # fmt: skip
        return train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]

    assert gap("first") == gap("second") == gap("checkpointed")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_hessian_free_run_logs_its_error(steps: int, engine: Any) -> None:
    """The figures are those of the tenth meta-batch at the initial parameters, which do not move."""
    torch.manual_seed(0)
    learner = MetaLearner(
        MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=steps, engine=engine, method="hessian_free",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    settings = ProbeSettings(memory=False, speed=False)
    figures = train(learner, SineWaves(), settings, meta_batch_size=4)[9]
    batch = SineWaves().batch(0, "train", range(9 * 4, 10 * 4))
    free, exact = (
        learner.engine.meta_gradient(learner.network, mse_loss, batch, inner).gradient
        for inner in (learner.inner, replace(learner.inner, method="checkpointed"))
    )
    expected = order_gaps(free, exact)[""]
    for measure, value in expected._asdict().items():
        assert figures[f"hessian_free_gap/{measure}"] == pytest.approx(value, rel=1e-12)
    assert 0 < expected.relative_error < 1e-5 < 0.05 < figures["order_gap/relative_error"]


def test_a_first_order_run_continues_where_second_order_is_unavailable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(1, 4)), nn.Linear(4, 1))
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01, first_order=True, engine="learn2learn")
    figures = train(learner, SineWaves(), ProbeSettings(every=5), steps=20)
    assert not any(name.startswith("order_gap") for found in figures.values() for name in found)
    (record,) = [r for r in caplog.records if "order_gap is not measured" in r.getMessage()]
    assert "weight" in record.getMessage()
