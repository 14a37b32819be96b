"""Partial adaptation: inner steps move some parameters, and all are meta-learned exactly."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import MetaLearner
from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, VectorizedEngine
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.meta_gradient.closed_form import quadratic
from maml_pipeline.meta_gradient.inner_loop import adapted_names
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Lines, Task, TaskBatch
from tests.helpers import SHORT, SHORT_NAME, Maml, read_metrics
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
from tests.zoo import ZOO, build

NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS | SMOOTH_NETWORKS
PARTS = [
    *[("tanh", [part]) for part in ("0.*", "2.*", "*.bias")],
    *[("strided", [part]) for part in ("head.*", "features.0.*", "features.*")],
    ("strided", ["*.10.bias", "features.4.weight"]),
    *[("group_and_layer_norm", [part]) for part in ("1.*", "[14].*", "6.weight")],
    *[("batch_norm", [part]) for part in ("8.*", "[05].*")],
]
"""A smooth network, and patterns of the parameters that adapt: heads, bodies, normalisation."""


def as_float(network: nn.Module, loss: Loss, batch: TaskBatch) -> tuple[nn.Module, Loss, TaskBatch]:
    """Convert a case to float32, whose rounding shows which kernels run."""
    tensors = (t.float() if t.is_floating_point() else t for t in batch)
    return network.float(), loss, TaskBatch(*tensors)


ENGINES: dict[str, Engine] = {
    "vectorized": VectorizedEngine(),
    "chunks": VectorizedEngine(tasks_per_chunk=2),
    "learn2learn": Learn2LearnEngine(),
}


# The meta-gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["truncated-1", "second", "checkpointed", "hessian-free"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "adapt"), PARTS)
def test_the_meta_gradient_of_all_parameters_is_exact(
    name: str, adapt: list[str], engine: str, order: str
) -> None:
    network, loss, batch = case(name, SMOOTH_NETWORKS[name], tasks=3)
    inner = replace(inner_loop(order, 0.1, 3), adapt=adapt)
    result = ENGINES[engine].meta_gradient(network, loss, batch, inner)
    oracle = PlainLoop(network, loss, inner)
    for part in ("adapted", "fixed"):  # separately, since one may be much smaller
        direction = {
            name: torch.randn_like(p) * ((name in oracle.moves) == (part == "adapted"))
            for name, p in network.named_parameters()
        }
        difference = oracle.slope(batch, direction, h=1e-4)
        assert inner_product(result.gradient, direction) == pytest.approx(difference, rel=1e-5), part
    first = ENGINES[engine].meta_gradient(network, loss, batch, inner.in_first_order())
    assert largest_relative_difference(first.gradient, oracle.first_order(batch)) <= 1e-10
    assert relative_difference(first, result) > 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", ["first", "truncated-2", "second"])
@pytest.mark.parametrize(("name", "adapt"), [*PARTS, ("max_pool", ["head.*"]), ("relu", ["0.*"])])
def test_engines_chunks_and_methods_agree(name: str, adapt: list[str], order: str) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)
    inner = replace(inner_loop(order, 0.1, 3), adapt=adapt)
    expected = ENGINES["learn2learn"].meta_gradient(network, loss, batch, inner)
    for engine in ENGINES.values():
        for method in [Method.UNROLLED] if inner.first_order else [Method.UNROLLED, Method.CHECKPOINTED]:
            other = replace(inner, method=method)
            actual = engine.meta_gradient(network, loss, batch, other)
            assert relative_difference(actual, expected) <= 1e-10
            torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=1e-10, atol=0)


def masked_meta_gradient(theta: Tensor, mask: Tensor, task: Task, inner: InnerLoop) -> Tensor:
    """Return the closed form for a linear unit of which only the parameters of a mask adapt.

    With M the diagonal matrix of the mask, theta_{t+1} = theta_t - alpha M (H_s theta_t - b_s), whose
    derivative is I - alpha M H_s. It is not symmetric.
    """
    H_s, b_s = quadratic(task.support_x, task.support_y)
    H_q, b_q = quadratic(task.query_x, task.query_y)
    A = torch.eye(len(theta), dtype=theta.dtype) - inner.lr * mask[:, None] * H_s
    for _ in range(inner.steps):
        theta = A @ theta + inner.lr * mask * b_s
    slope = torch.linalg.matrix_power(A, inner.steps - inner.first_differentiated_step)
    gradient: Tensor = slope.T @ (H_q @ theta - b_q)
    return gradient


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed"])
@pytest.mark.parametrize("adapt", ["weight", "bias"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_linear_units_agree_with_the_closed_form(
    engine: str, order: str, adapt: str, steps: int
) -> None:
    torch.manual_seed(steps)
    x, y = torch.randn(2, 3, 6, 4).double(), torch.randn(2, 3, 6, 1).double()
    batch, network = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(4, 1).double()
    inner = replace(inner_loop(order, 0.2, steps), adapt=[adapt])
    actual = flatten(ENGINES[engine].meta_gradient(network, mse_loss, batch, inner).gradient)
    theta = torch.cat([network.weight.detach()[0], network.bias.detach()])
    mask = torch.tensor([adapt == "weight"] * 4 + [adapt == "bias"]).double()
    each = [masked_meta_gradient(theta, mask, task, inner) for task in batch.tasks()]
    expected = torch.stack(each).mean(0)
    assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("settings", [{"first_order": True}, {}, {"method": "checkpointed"}])
@pytest.mark.parametrize("name", ["strided", "relu", "batch_norm"])
def test_adapting_everything_by_a_pattern_changes_no_bit(
    name: str, settings: dict[str, Any], engine: str
) -> None:
    network, loss, batch = as_float(*case(name, NETWORKS[name], tasks=3))
    inner = InnerLoop(0.1, 3, **settings)
    plain, pattern = (
        ENGINES[engine].meta_gradient(network, loss, batch, replace(inner, adapt=adapt))
        for adapt in (None, ["*"])
    )
    assert torch.equal(plain.inner_losses, pattern.inner_losses)
    for name, g in plain.gradient.items():
        assert torch.equal(g, pattern.gradient[name])


class FrozenUnusedAndTied(nn.Module):
    """A network with a frozen layer, an unused one, and one that is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.shared = nn.Linear(2, 2)
        self.also_shared = self.shared
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.also_shared(torch.tanh(self.shared(self.frozen(x)))))
        return y


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["truncated-1", "second", "checkpointed", "hessian-free"])
@pytest.mark.parametrize("adapt", ["also_shared.*", "head.*", "unused.*"])
def test_frozen_unused_and_tied_parameters(adapt: str, order: str, engine: str) -> None:
    network, loss, batch = case("shared", FrozenUnusedAndTied, tasks=3)
    inner = replace(inner_loop(order, 0.1, 2), adapt=[adapt])
    result = ENGINES[engine].meta_gradient(network, loss, batch, inner)
    oracle = PlainLoop(network, loss, replace(inner, adapt=[adapt.removeprefix("also_")]))
    direction = {name: torch.randn_like(p) for name, p in oracle.theta.items()}
    difference = oracle.slope(batch, direction, h=1e-4)
    assert inner_product(result.gradient, direction) == pytest.approx(difference, rel=1e-6)
    assert result.gradient["unused.weight"].abs().sum() == 0


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about single layers
@pytest.mark.parametrize("settings", [{"first_order": True}, {}, {"method": "checkpointed"}])
@pytest.mark.parametrize("engine", ["vectorized", "learn2learn"])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", [name for name, one in ZOO.items() if not one.stops_gradients])
def test_networks_as_users_write_them_are_exact_or_rejected(
    name: str, position: int, engine: str, settings: dict[str, Any]
) -> None:
    entry = ZOO[name]
    network, batch = build(entry)
    parameter = [name for name, p in network.named_parameters() if p.requires_grad][position]
    inner = InnerLoop(0.05, 2, adapt=[parameter], **settings)
    try:
        actual = ENGINES[engine].meta_gradient(network, entry.loss, batch, inner).gradient
    except UserError:
        return
    if not entry.random:
        oracle = PlainLoop(network, entry.loss, inner)
        first_order = oracle.first_order(batch)
        if inner.first_order:
            for name, g in first_order.items():
                torch.testing.assert_close(actual[name], g, rtol=1e-6, atol=1e-9)
        else:
            # Parameters excluded from learning, such as a padding row, may still influence the loss.
            direction = {name: torch.randn_like(g) * (g != 0) for name, g in first_order.items()}
            slope = oracle.slope(batch, direction, h=1e-7)
            assert inner_product(actual, direction) == pytest.approx(slope, rel=1e-6, abs=1e-7)


# Evaluation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "adapt"), PARTS)
def test_an_evaluation_moves_the_adapted_parameters_alone(
    name: str, adapt: list[str], engine: str
) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)
    network.eval()
    inner = InnerLoop(0.1, 3, adapt=adapt)
    curves = ENGINES[engine].adaptation_curves(network, {"loss": loss}, loss, batch, inner)["loss"]
    torch.testing.assert_close(curves, PlainLoop(network, loss, inner).curves(batch), rtol=1e-10, atol=0)
    adapted = ENGINES[engine].adapted_parameters(
        network, loss, batch.support_x[0], batch.support_y[0], inner
    )
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, adapted[name])}
    assert moved == set(PlainLoop(network, loss, inner).moves)


BITWISE: dict[str, tuple[str, list[str]]] = {
    "head of images": ("strided", ["head.*"]),
    "body of images": ("max_pool", ["features.*"]),
    "head": ("relu", ["4.*"]),
    "body": ("relu", ["0.*", "2.*"]),
}


@pytest.mark.parametrize("engine", ["vectorized", "learn2learn"])
@pytest.mark.parametrize("name", BITWISE)
def test_the_adapted_network_predicts_to_the_bit_what_the_evaluation_measures(
    name: str, engine: Literal["vectorized", "learn2learn"]
) -> None:
    network_name, adapt = BITWISE[name]
    network, loss, batch = as_float(*case(network_name, NETWORKS[network_name], tasks=7))
    learner = MetaLearner(
        network, loss=loss, inner_lr=0.1, eval_inner_steps=3, engine=engine, adapt=adapt
    ).eval()
    with torch.inference_mode():
        curves = learner.engine.adaptation_curves(
            network, learner.measures, loss, batch, learner.eval_inner
        )
    for index, task in enumerate(batch.tasks()):
        model = learner.adapt(task.support_x, task.support_y)
        with torch.no_grad():
            measured = loss(model(task.query_x.clone()), task.query_y)
        assert torch.equal(measured, curves["loss"][index, -1])
        assert {
            n for n, p in network.named_parameters() if not torch.equal(p, model.get_parameter(n))
        } == (set(adapted_names(network, adapt)))


# A run --------------------------------------------------------------------------------------------


def test_a_run_trains_what_does_not_adapt_and_is_loaded_and_exported_with_it(maml: Maml) -> None:
    run = Path("runs") / SHORT_NAME
    maml("fit", *SHORT, "--model.adapt", "[weight]", "--probes.every", 5)
    learner = MetaLearner.from_run(run)
    assert learner.inner.adapt == learner.eval_inner.adapt == ("weight",)
    task = Lines().task(seed=0, split="test", index=0)
    model = learner.adapt(task.support_x, task.support_y)
    assert torch.equal(model.bias, learner.network.bias)  # type: ignore[arg-type]
    assert not torch.equal(model.weight, learner.network.weight)  # type: ignore[arg-type]
    assert any("order_gap/cosine/bias" in row or "order_gap/cosine" in row for row in read_metrics(run))
    maml("export", run, "toy.pt")
    assert yaml.safe_load(Path("toy.yaml").read_text())["adaptation"]["adapt"] == ["weight"]

    untrained = MetaLearner.from_run(run)
    maml("fit", *SHORT, "--model.adapt", "[weight]", "--trainer.max_steps", 30, "--ckpt_path", "last")
    longer = MetaLearner.from_run(run, "last")
    assert not torch.equal(longer.network.bias, untrained.network.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (
            ["head.*"],
            r"adapt has head\.\*, which matches no .* MLP; they are 0\.weight, 0\.bias, 2\.weight",
        ),
        (["4.*", "1.*"], r"adapt has 1\.\*, which matches no trainable parameter"),
        ([], r"adapt is \[\]; it must be a list of patterns"),
        ("4.*", r"adapt is '4\.\*'; it must be a list of patterns"),
        ([4], r"adapt is \[4\]; it must be a list of patterns"),
    ],
)
def test_patterns_that_match_nothing_are_rejected(adapt: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MetaLearner(MLP(), loss=mse_loss, inner_lr=0.1, adapt=adapt)
    frozen = MLP()
    frozen[4].requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        adapted_names(frozen, ["4.*"])


# Memory -------------------------------------------------------------------------------------------


def bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


METHODS: dict[str, dict[str, Any]] = {
    "first order": {"first_order": True},
    "unrolled": {},
    "checkpointed": {"method": "checkpointed"},
    "hessian-free": {"method": "hessian_free"},
}


@pytest.mark.parametrize("settings", METHODS)
def test_a_task_needs_no_copy_of_the_parameters_that_do_not_adapt(settings: str) -> None:
    network = nn.Sequential(
        nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 1)
    )
    fixed = bytes_of(network[:3].parameters())

    def each(adapt: Sequence[str] | None) -> float:
        """Return the memory that each of 4 further tasks needs."""
        inner = InnerLoop(0.1, 3, **METHODS[settings], adapt=adapt)
        engine, peaks = VectorizedEngine(), []
        for tasks in (4, 8):
            batch = TaskBatch(*(torch.rand(tasks, 2, n) for n in (64, 1, 64, 1)))
            engine.meta_gradient(network, mse_loss, batch, inner)
            peaks.append(peak_bytes(partial(engine.meta_gradient, network, mse_loss, batch, inner)))
        return (peaks[1] - peaks[0]) / 4

    assert each(None) > 2 * fixed
    assert each(["4.*"]) < 0.2 * fixed


def test_checkpoints_hold_the_adapted_parameters_alone() -> None:
    network = ConvNet(5, filters=16)
    x, y = torch.rand(2, 1, 5, 1, 28, 28), torch.arange(5)[None]
    batch = TaskBatch(x[0], y, x[1], y)
    for engine in (VectorizedEngine(), Learn2LearnEngine()):
        peaks = []
        for steps in (1, 3, 11):
            inner = InnerLoop(0.1, steps, method="checkpointed", adapt=["features.0.*"])
            call = partial(engine.meta_gradient, network, cross_entropy, batch, inner)
            call()
            peaks.append(peak_bytes(call))
        copy = bytes_of(network.features[0].parameters())
        for steps, peak in zip((3, 11), peaks[1:], strict=True):
            assert peak - peaks[0] == (longest_segment(steps) - 1) * copy + (steps - 1) * 4
