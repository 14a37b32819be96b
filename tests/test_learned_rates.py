"""Learned inner learning rates: one for each adapted parameter and inner step, meta-learned exactly."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.learner import LearnedInnerLr
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Learn2LearnEngine,
    NativeEngine,
    VectorizedEngine,
)
from maml_pipeline.meta_gradient.closed_form import quadratic
from maml_pipeline.meta_gradient.inner_loop import adapted_names
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import Lines, SineWaves, Task, TaskBatch
from tests.helpers import (
    SHORT,
    SHORT_NAME,
    Maml,
    assert_same_run,
    make_trainer,
    read_checkpoint,
    read_metrics,
)
from tests.networks import (
    IMAGE_NETWORKS,
    SMOOTH_NETWORKS,
    VECTOR_NETWORKS,
    case,
    flatten,
    inner_loop,
    largest_relative_difference,
    relative_difference,
)
from tests.oracles import PlainLoop, inner_product

NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS | SMOOTH_NETWORKS
ENGINES: dict[str, Engine] = {
    "vectorized": VectorizedEngine(),
    "chunks": VectorizedEngine(tasks_per_chunk=2),
    "learn2learn": Learn2LearnEngine(),
}
METHODS: dict[str, dict[str, Any]] = {
    "first order": {"first_order": True},
    "unrolled": {},
    "checkpointed": {"method": "checkpointed"},
    "truncated": {"differentiated_steps": 1},
    "truncated, checkpointed": {"differentiated_steps": 2, "method": "checkpointed"},
    "Hessian-free": {"method": "hessian_free"},
}
PARTS = [
    ("tanh", None),
    ("tanh", ["2.*"]),
    pytest.param("strided", ["head.*", "features.9.*"], marks=pytest.mark.exhaustive),
    pytest.param("batch_norm", ["[05].*"], marks=pytest.mark.exhaustive),
]


def with_rates(network: nn.Module, inner: InnerLoop, steps: int) -> InnerLoop:
    """Give every parameter and inner step another rate, of which one is negative."""
    rates = {
        name: inner.lr * (0.5 + torch.rand(steps, dtype=torch.float64))
        for name in adapted_names(network, inner.adapt)
    }
    next(iter(rates.values()))[0] *= -1
    return replace(inner, rates=rates)


# The meta-gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "adapt"), PARTS)
def test_the_gradient_of_every_rate_is_exact(
    name: str, adapt: Sequence[str] | None, engine: str, method: str
) -> None:
    network, loss, batch = case(name, SMOOTH_NETWORKS[name], tasks=3)
    inner = with_rates(network, InnerLoop(0.1, 3, **METHODS[method], adapt=adapt), steps=3)
    result = ENGINES[engine].meta_gradient(network, loss, batch, inner)
    oracle = PlainLoop(network, loss, inner)
    if inner.first_order:
        expected = oracle.first_order_of_rates(batch)
        assert largest_relative_difference(result.rates, expected) <= 1e-10
        assert largest_relative_difference(result.gradient, oracle.first_order(batch)) <= 1e-10
        return
    slopes = {
        name: torch.tensor([oracle.slope_of_rates(batch, name, t, h=1e-4) for t in range(3)]).double()
        for name in oracle.moves
    }
    tolerance = 1e-4 if inner.method == "hessian_free" else 1e-6
    assert largest_relative_difference(result.rates, slopes) <= tolerance
    direction = {name: torch.randn_like(p) for name, p in oracle.theta.items()}
    difference = oracle.slope(batch, direction, h=1e-4)
    assert inner_product(result.gradient, direction) == pytest.approx(difference, rel=tolerance)


def closed_form(theta: Tensor, rates: Tensor, task: Task, inner: InnerLoop) -> tuple[Tensor, Tensor]:
    """Return the meta-gradients of a linear unit and of its rates `(k, D + 1)`, one for each parameter.

    With A_t = I - diag(rates_t) H, step t is theta_{t+1} = A_t theta_t + diag(rates_t) b.
    """
    (H, b), (H_q, b_q) = quadratic(task.support_x, task.support_y), quadratic(task.query_x, task.query_y)
    gradients = []
    for t in range(inner.steps):
        gradients.append(H @ theta - b)
        theta = theta - rates[t] * gradients[t]
    adjoint, of_rates = H_q @ theta - b_q, torch.zeros_like(rates)
    for t in reversed(range(inner.steps)):
        of_rates[t] = -adjoint * gradients[t]
        if t >= inner.first_differentiated_step:
            adjoint = adjoint - H @ (rates[t] * adjoint)
    return adjoint, of_rates


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed", "hessian-free"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_rates_of_linear_units_agree_with_the_closed_form(engine: str, order: str, steps: int) -> None:
    torch.manual_seed(steps)
    x, y = torch.randn(2, 3, 6, 4).double(), torch.randn(2, 3, 6, 1).double()
    batch, network = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(4, 1).double()
    inner = with_rates(network, inner_loop(order, 0.2, steps), steps)
    assert inner.rates is not None
    result = ENGINES[engine].meta_gradient(network, mse_loss, batch, inner)
    theta = torch.cat([network.weight.detach()[0], network.bias.detach()])
    rates = torch.stack([inner.rates["weight"]] * 4 + [inner.rates["bias"]], dim=1)
    each = [closed_form(theta, rates, task, inner) for task in batch.tasks()]
    gradient, of_rates = (torch.stack(one).mean(0) for one in zip(*each, strict=True))
    # Differences of a linear gradient are exact but for rounding, several times eps / (e |v|) = 2e-7.
    tolerance = 1e-6 if order == "hessian-free" else 1e-12
    assert (flatten(result.gradient) - gradient).norm() <= tolerance * gradient.norm()
    expected = {"weight": of_rates[:, :4].sum(1), "bias": of_rates[:, 4]}
    assert largest_relative_difference(result.rates, expected) <= 10 * tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["relu", pytest.param("max_pool", marks=pytest.mark.exhaustive)])
def test_equal_rates_are_a_plain_inner_learning_rate(name: str, engine: str, method: str) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)
    inner = InnerLoop(0.1, 3, **METHODS[method])
    plain = ENGINES[engine].meta_gradient(network, loss, batch, inner)
    assert not plain.rates
    rates = {name: torch.full((3,), 0.1, dtype=torch.float64) for name, _ in network.named_parameters()}
    learned = ENGINES[engine].meta_gradient(network, loss, batch, replace(inner, rates=rates))
    tolerance = 1e-4 if inner.method == "hessian_free" else 1e-10
    assert relative_difference(learned, plain) <= tolerance
    assert learned.rates.keys() == rates.keys()
    reference = ENGINES["learn2learn"].meta_gradient(network, loss, batch, replace(inner, rates=rates))
    assert largest_relative_difference(learned.rates, reference.rates) <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_beyond_the_learned_ones_take_the_last_rate(engine: str, method: str) -> None:
    network, loss, batch = case("tanh", NETWORKS["tanh"], tasks=3)
    short = with_rates(network, InnerLoop(0.1, 4, **METHODS[method]), steps=2)
    assert short.rates is not None
    long = replace(short, rates={name: r[[0, 1, 1, 1]] for name, r in short.rates.items()})
    actual, expected = (
        ENGINES[engine].meta_gradient(network, loss, batch, inner) for inner in (short, long)
    )
    assert relative_difference(actual, expected) <= 1e-12
    for name, g in expected.rates.items():
        torch.testing.assert_close(actual.rates[name], torch.stack([g[0], g[1:].sum()]))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_takes_the_learned_rates(engine: str) -> None:
    network, loss, batch = case("strided", NETWORKS["strided"], tasks=3)
    network.eval()
    inner = with_rates(network, InnerLoop(0.1, 4), steps=2)
    curves = ENGINES[engine].adaptation_curves(network, {"loss": loss}, loss, batch, inner)["loss"]
    torch.testing.assert_close(curves, PlainLoop(network, loss, inner).curves(batch), rtol=1e-10, atol=0)
    plain = ENGINES[engine].adaptation_curves(network, {"loss": loss}, loss, batch, InnerLoop(0.1, 4))
    assert not torch.allclose(curves, plain["loss"])


# A run --------------------------------------------------------------------------------------------

LEARNED = ("--model.learned_inner_lr.lr", 0.01, "--model.inner_steps", 2)


@pytest.mark.parametrize(
    "settings", [{"first_order": True}, {"first_order": False}, {"method": "hessian_free"}]
)
def test_a_meta_step_moves_each_rate_by_its_own_learning_rate(settings: dict[str, Any]) -> None:
    def descent(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.02, weight_decay=0.3)

    torch.manual_seed(0)
    learner = MetaLearner(
        MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=3, learned_inner_lr=LearnedInnerLr(0.005),
        optimizer=descent, **settings,
    ).double()  # fmt: skip
    data = TaskDataModule(SineWaves(shots=10), meta_batch_size=4)
    batch = SineWaves(shots=10).batch(0, "train", range(4))
    assert learner.inner_rates is not None and learner.inner_rates.shape == (6, 3)
    before = learner.inner_rates.detach().clone()
    torch.testing.assert_close(before, torch.full_like(before, 0.01), rtol=1e-6, atol=0)
    batch = type(batch)(*(tensor.double() for tensor in batch))
    rates = NativeEngine().meta_gradient(learner.network, mse_loss, batch, learner.inner_loop()).rates
    trainer = make_trainer(max_steps=1, precision="64-true")
    trainer.fit(learner, datamodule=data)
    torch.testing.assert_close(
        learner.inner_rates.detach(), before - 0.005 * torch.stack([*rates.values()]), rtol=1e-9, atol=0
    )
    groups = trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.005]
    assert groups[1]["params"][0] is learner.inner_rates


def test_a_run_learns_logs_saves_loads_and_exports_its_rates(maml: Maml) -> None:
    run = Path("runs") / SHORT_NAME
    maml("fit", *SHORT, *LEARNED)
    learner = MetaLearner.from_run(run, "last")
    assert learner.inner_rates is not None
    assert torch.equal(learner.inner_rates, read_checkpoint(run, "last")["state_dict"]["inner_rates"])
    assert not torch.allclose(learner.inner_rates, torch.tensor(0.1), rtol=1e-3)
    logged = [float(row["train/inner_lr"]) for row in read_metrics(run) if row["train/inner_lr"]]
    assert logged and logged[-1] != pytest.approx(0.1, rel=1e-3)

    task = Lines().task(seed=0, split="test", index=0)
    expected = step_by_hand(
        learner, task.support_x, task.support_y, steps=3
    )  # one more than in training
    model = learner.adapt(task.support_x, task.support_y)
    torch.testing.assert_close(dict(model.named_parameters()), expected)
    plain = learner.adapt(task.support_x, task.support_y, inner_lr=0.1)
    assert not torch.allclose(plain.weight, model.weight)  # type: ignore[arg-type]

    maml("export", run, "toy.pt", "--which", "last")
    exported = yaml.safe_load(Path("toy.yaml").read_text())["adaptation"]["learned_inner_lr"]
    assert exported == dict(zip(["weight", "bias"], learner.inner_rates.tolist(), strict=True))
    assert torch.load("toy.pt", weights_only=True).keys() == {"weight", "bias"}


def test_rates_are_not_loaded_for_other_parameters(tmp_path: Path) -> None:
    def make(adapt: list[str]) -> MetaLearner:
        return MetaLearner(
            MLP(hidden_features=[1]), loss=mse_loss, inner_lr=0.1, adapt=adapt,
            learned_inner_lr=LearnedInnerLr(),
        )  # fmt: skip

    trainer = make_trainer(max_steps=1)
    trainer.fit(make(["0.*"]), datamodule=TaskDataModule(SineWaves(), 1))
    trainer.save_checkpoint(path := tmp_path / "x.ckpt")
    settings = {"network": MLP(hidden_features=[1]), "loss": mse_loss, "inner_lr": 0.1}
    learned = {"learned_inner_lr": LearnedInnerLr()}
    same = MetaLearner.load_from_checkpoint(path, **settings, **learned, adapt=["0.*"])
    assert same.inner_rates is not None
    with pytest.raises(UserError, match=r"rates are those of 0\.weight, where here 2\.weight adapts"):
        MetaLearner.load_from_checkpoint(path, **settings, **learned, adapt=["2.*"])


def step_by_hand(learner: MetaLearner, x: Tensor, y: Tensor, steps: int) -> dict[str, Tensor]:
    assert learner.inner_rates is not None
    linear = nn.Linear(1, 1)
    linear.load_state_dict(learner.network.state_dict())
    for t in range(steps):
        linear.zero_grad()
        mse_loss(linear(x), y).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for row, p in enumerate(linear.parameters()):
                assert p.grad is not None
                p.sub_(learner.inner_rates[row, min(t, 1)] * p.grad)
    return dict(linear.named_parameters())


@pytest.mark.parametrize("order", [(), ("--model.first_order", "true")])
def test_a_resumed_run_ends_with_the_same_rates_to_the_bit(maml: Maml, order: tuple[str, ...]) -> None:
    settings = ("fit", *SHORT, *LEARNED, *order)
    maml(*settings, "--run.dir", "whole")
    maml(*settings, "--run.dir", "resumed", "--trainer.max_steps", 5)
    maml(*settings, "--run.dir", "resumed", "--ckpt_path", "last")
    assert_same_run(Path("whole"), Path("resumed"))


def test_a_run_without_learned_rates_has_none(maml: Maml) -> None:
    maml("fit", *SHORT)
    checkpoint = read_checkpoint(Path("runs") / SHORT_NAME, "last")
    assert checkpoint["state_dict"].keys() == {"network.weight", "network.bias"}
    assert MetaLearner.from_run(Path("runs") / SHORT_NAME).inner_rates is None


@pytest.mark.parametrize("steps", [0, 1])
def test_settings_that_learn_nothing_are_rejected(steps: int) -> None:
    with pytest.raises(UserError, match=r"inner_steps is 0|learned_inner_lr\.lr is 0"):
        MetaLearner(
            MLP(), loss=mse_loss, inner_lr=0.1, inner_steps=steps,
            learned_inner_lr=LearnedInnerLr(0.0 if steps else 0.1),
        )  # fmt: skip
