"""Every engine, order and method computes what plain autograd computes, or refuses."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, VectorizedEngine
from maml_pipeline.meta_gradient.inner_loop import Parameters, trainable_parameters
from maml_pipeline.tasks import TaskBatch
from tests.zoo import ZOO, Entry

ENGINES: dict[str, Engine] = {"vectorized": VectorizedEngine(), "learn2learn": Learn2LearnEngine()}
UNROLLED = InnerLoop(0.05, 2)
INNER_LOOPS = {
    "first": replace(UNROLLED, first_order=True),
    "second": UNROLLED,
    "second checkpointed": replace(UNROLLED, checkpointed=True),
}
# vmap says that it takes such a layer task by task.
pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.*weight_norm.* is deprecated"
)


def build(entry: Entry) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    network = entry.build().double()
    for module in network.modules():  # a list holds no module twice
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and name == "view":
                module.view = module.b.weight.detach().view(16)
    generator = torch.Generator().manual_seed(1)

    def x() -> Tensor:
        if entry.inputs == "tokens":
            return torch.randint(5, (3, 6, 3), generator=generator)
        if entry.inputs == "images":
            return torch.rand(3, 6, 1, 28, 28, generator=generator, dtype=torch.float64)
        return torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)

    def y() -> Tensor:
        if entry.inputs == "images":
            return torch.arange(3).repeat(3, 2)
        return torch.randn(3, 6, 1, generator=generator, dtype=torch.float64)

    if isinstance(entry.loss, nn.Module):
        entry.loss.double()
    return network, TaskBatch(x(), y(), x(), y())


def refusal(entry: Entry, way: str) -> str | None:
    return next((message for start, message in entry.refused.items() if way.startswith(start)), None)


class InPlace:
    """The oracle: adapt each task with plain autograd, the network's own parameters changed in place."""

    def __init__(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        self.network, self.loss, self.batch, self.inner = network, loss, batch, inner
        self.parameters = trainable_parameters(network)
        self.theta = {name: p.detach().clone() for name, p in self.parameters.items()}

    def gradient(self, theta: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Parameters]:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])
        loss = self.loss(self.network(x.clone()), y.clone())
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        named = zip(self.parameters.items(), gradients, strict=True)
        return loss.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}

    def adapt(self, theta: Parameters) -> tuple[Tensor, Parameters]:
        """Return the query losses `(T, k + 1)` and the first-order meta-gradient."""
        curves, total = [], {name: torch.zeros_like(p) for name, p in theta.items()}
        for task in self.batch.tasks():
            theta_t, curve = theta, []
            for _ in range(self.inner.steps):
                curve.append(self.gradient(theta_t, task.query_x, task.query_y)[0])
                _, g = self.gradient(theta_t, task.support_x, task.support_y)
                theta_t = {name: p - self.inner.lr * g[name] for name, p in theta_t.items()}
            loss, g = self.gradient(theta_t, task.query_x, task.query_y)
            curves.append(torch.stack([*curve, loss]))
            total = {name: t + g[name] / len(self.batch.support_x) for name, t in total.items()}
        self.gradient(self.theta, self.batch.query_x[0], self.batch.query_y[0])  # puts theta back
        return torch.stack(curves), total

    def slope(self, direction: Parameters, h: float = 1e-4) -> float:
        """Differentiate the adapted query loss along a direction, by differences of fourth order."""

        def loss(distance: float) -> float:
            theta = {name: p + distance * direction[name] for name, p in self.theta.items()}
            return float(self.adapt(theta)[0][:, -1].mean())

        return (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)


@pytest.mark.parametrize("order", INNER_LOOPS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ZOO)
def test_meta_gradients_are_exact_or_refused(name: str, engine: str, order: str) -> None:
    entry, inner = ZOO[name], INNER_LOOPS[order]
    network, batch = build(entry)
    before = [tensor.clone() for tensor in batch]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    message = refusal(entry, f"train {engine} {order}")

    def compute() -> Parameters:
        return ENGINES[engine].meta_gradient(network, entry.loss, batch, inner).gradient

    if message is not None:
        with pytest.raises(UserError, match=message) as refused:
            compute()
        assert "\n" not in str(refused.value)
        assert re.search("set |use |with |leave |read |give |divide|take|MAML needs", str(refused.value))
    else:
        actual = compute()
        if not entry.random:
            again = compute()
            assert all(torch.equal(g, again[key]) for key, g in actual.items())
            check_against_oracle(entry, network, batch, inner, actual)
    assert all(map(torch.equal, batch, before))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def check_against_oracle(
    entry: Entry, network: nn.Module, batch: TaskBatch, inner: InnerLoop, actual: Parameters
) -> None:
    oracle = InPlace(network, entry.loss, batch, inner)
    _, first_order = oracle.adapt(oracle.theta)
    if inner.first_order:
        for name, g in first_order.items():
            torch.testing.assert_close(actual[name], g, rtol=1e-6, atol=1e-9)
    elif not entry.stops_gradients:
        generator = torch.Generator().manual_seed(2)
        # What is kept from learning, as a padding row, may have a slope all the same.
        direction = {
            name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * (g != 0)
            for name, g in first_order.items()
        }
        slope = sum(float((actual[name] * d).sum()) for name, d in direction.items())
        assert slope == pytest.approx(oracle.slope(direction), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ZOO)
def test_evaluations_are_exact_or_refused(name: str, engine: str) -> None:
    entry = ZOO[name]
    network, batch = build(entry)
    network.eval()
    message = refusal(entry, f"eval {engine}")

    def compute() -> Tensor:
        with torch.inference_mode():
            return ENGINES[engine].adaptation_curves(
                network, {"loss": entry.loss}, entry.loss, batch, UNROLLED
            )["loss"]

    if message is not None:
        with pytest.raises(UserError, match=message):
            compute()
        return
    expected, _ = InPlace(network, entry.loss, batch, UNROLLED).adapt(
        {name: p.detach().clone() for name, p in trainable_parameters(network).items()}
    )
    for _ in range(2):
        torch.testing.assert_close(compute().clone(), expected, rtol=1e-6, atol=1e-9)
