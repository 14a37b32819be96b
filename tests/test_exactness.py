"""Each engine, order and method computes what plain autograd computes, or rejects the network."""

import logging
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Learn2LearnEngine,
    VectorizedEngine,
    vectorized_engine,
)
from maml_pipeline.meta_gradient.exactness import LossesAndGradient, Workarounds, workarounds
from maml_pipeline.meta_gradient.exactness.plain_autograd import PlainAutograd
from maml_pipeline.meta_gradient.exactness.preservation import preserve_state
from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.order_gap import order_gaps
from maml_pipeline.networks import ConvNet
from maml_pipeline.tasks import TaskBatch
from tests.oracles import PlainLoop, inner_product
from tests.zoo import ZOO, Calling, Entry, build

ENGINES: dict[str, Engine] = {"vectorized": VectorizedEngine(), "learn2learn": Learn2LearnEngine()}
UNROLLED = InnerLoop(0.05, 2)
INNER_LOOPS = {
    "first": replace(UNROLLED, first_order=True),
    "second": UNROLLED,
    "second checkpointed": replace(UNROLLED, method="checkpointed"),
    "second truncated": replace(UNROLLED, differentiated_steps=1),
    "hessian free": replace(UNROLLED, method="hessian_free"),
}
# vmap warns about layers that it computes task by task.
pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop",
    "ignore:.*weight_norm.* is deprecated",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)


def rejection(entry: Entry, computation: str) -> str | None:
    return next(
        (message for start, message in entry.rejected.items() if computation.startswith(start)), None
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", INNER_LOOPS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ZOO)
def test_meta_gradients_are_exact_or_rejected(name: str, engine: str, order: str) -> None:
    entry, inner = ZOO[name], INNER_LOOPS[order]
    network, batch = build(entry)
    before = [tensor.clone() for tensor in batch]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    message = rejection(entry, f"train {engine} {order}")

    def compute() -> Parameters:
        return ENGINES[engine].meta_gradient(network, entry.loss, batch, inner).gradient

    if message is not None:
        with pytest.raises(UserError, match=message) as rejected:
            compute()
        assert "\n" not in str(rejected.value)
        assert re.search(
            "set |use |with |leave |read |give |divide|take|MAML needs", str(rejected.value)
        )
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
    oracle = PlainLoop(network, entry.loss, inner)
    first_order = oracle.first_order(batch)
    if inner.first_order:
        for name, g in first_order.items():
            torch.testing.assert_close(actual[name], g, rtol=1e-6, atol=1e-9)
    elif entry.stops_gradients:  # autograd's derivative is not that of the loss values
        with preserve_state(network):
            plain_autograd = PlainAutograd(network, entry.loss, Workarounds(copy_inputs=True))
            expected = plain_autograd.meta_gradient(oracle.theta, batch, inner).gradient
        for name, g in expected.items():
            torch.testing.assert_close(actual[name], g, rtol=1e-5, atol=1e-7)
    else:
        generator = torch.Generator().manual_seed(2)
        # Parameters excluded from learning, such as a padding row, may still influence the loss.
        direction = {
            name: torch.randn(g.shape, generator=generator, dtype=g.dtype) * (g != 0)
            for name, g in first_order.items()
        }
        slope = oracle.slope(batch, direction, h=1e-7)
        assert inner_product(actual, direction) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ZOO)
def test_evaluations_are_exact_or_rejected(name: str, engine: str) -> None:
    entry = ZOO[name]
    network, batch = build(entry)
    network.eval()
    message = rejection(entry, f"eval {engine}")

    def compute() -> Tensor:
        with torch.inference_mode():
            return ENGINES[engine].adaptation_curves(
                network, {"loss": entry.loss}, entry.loss, batch, UNROLLED
            )["loss"]

    if message is not None:
        with pytest.raises(UserError, match=message):
            compute()
        return
    expected = PlainLoop(network, entry.loss, UNROLLED).curves(batch)
    for _ in range(2):
        torch.testing.assert_close(compute().clone(), expected, rtol=1e-6, atol=1e-9)


def test_a_network_is_checked_once_and_left_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    network, batch = build(ZOO["attention"])
    network.float()
    batch = TaskBatch(*(tensor.float() for tensor in batch))
    storages = [p.data_ptr() for p in network.parameters()]
    values = [p.detach().clone() for p in network.parameters()]
    calls = []
    network.register_forward_hook(lambda *arguments: calls.append(arguments[1][0].dtype))
    random_state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="maml_pipeline"):
        for _ in range(3):
            before = len(calls)
            VectorizedEngine().meta_gradient(network, mse_loss, batch, InnerLoop(0.1, 1))
    assert torch.float64 in calls  # compared with plain autograd in it
    assert len(calls) - before == 2  # support and query set, all tasks at once
    assert [message for message in caplog.messages if "math kernel" in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert [p.data_ptr() for p in network.parameters()] == storages
    assert all(map(torch.equal, network.parameters(), values))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["tanh", "attention", "bag", "ConvNet", "frozen", "class weights"])
def test_differences_are_close_to_exact_second_derivatives_in_both_types(
    name: str, dtype: torch.dtype, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, batch = build(ZOO[name])
    network.to(dtype)
    if isinstance(loss := ZOO[name].loss, nn.Module):
        loss.to(dtype)
    batch = TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in batch))
    free = INNER_LOOPS["hessian free"]
    actual = ENGINES[engine].meta_gradient(network, loss, batch, free).gradient
    assert not caplog.messages
    if name == "bag":  # without a second derivative
        return
    exact = ENGINES[engine].meta_gradient(network, loss, batch, replace(free, method="checkpointed"))
    tolerance = 1e-6 if dtype is torch.float64 else 1e-5
    assert order_gaps(actual, exact.gradient)[""].relative_error <= tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_differences_in_mixed_precision_are_computed_in_double_precision(engine: str) -> None:
    network, batch = build(ZOO["tanh"])
    network.float()
    batch = TaskBatch(*(t.float() for t in batch))
    types = set()
    network.register_forward_hook(lambda *arguments: types.add(arguments[2].dtype))
    inner = replace(INNER_LOOPS["hessian free"], steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            types.clear()
            ENGINES[engine].meta_gradient(network, mse_loss, batch, inner)
    assert torch.float64 in types and len(types) == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_units_at_their_kink_are_reported(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of units at exactly 0 some cross their kink ahead, and some behind."""
    torch.manual_seed(0)
    first = nn.Linear(2, 16)
    nn.init.zeros_(first.bias)
    network = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 1))
    _, y, x_query, y_query = (torch.randn(2, 6, n) for n in (2, 1, 2, 1))
    batch = TaskBatch(torch.zeros(2, 6, 2), y, x_query, y_query)
    ENGINES[engine].meta_gradient(network, mse_loss, batch, InnerLoop(0.05, 1, method="hessian_free"))
    (message,) = caplog.messages
    assert "off exact second order for network Sequential" in message


@pytest.mark.parametrize("engine", ENGINES)
def test_differences_need_a_network_that_runs_in_double_precision(engine: str) -> None:
    def in_single(self: Any, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x).float() @ torch.ones(4, 4)))  # type: ignore[no-any-return]

    network, batch = build(Entry(lambda: Calling(in_single)))
    network.float()
    batch = TaskBatch(*(t.float() for t in batch))
    with pytest.raises(UserError, match="differences of gradients in float64, in which network Calling"):
        ENGINES[engine].meta_gradient(network, mse_loss, batch, INNER_LOOPS["hessian free"])


def test_a_layer_that_starts_to_draw_random_numbers_is_checked_again() -> None:
    network, batch = build(ZOO["dropout"])
    dropout = next(module for module in network.modules() if isinstance(module, nn.Dropout))
    compute = partial(VectorizedEngine().meta_gradient, network, mse_loss, batch, INNER_LOOPS["second"])
    dropout.eval()
    compute()
    dropout.train()
    with pytest.raises(UserError, match="draws random numbers"):
        compute()
    probability, dropout.p = dropout.p, 0.0
    compute()
    dropout.p = probability
    with pytest.raises(UserError, match="draws random numbers"):
        compute()


def test_first_order_uses_the_fused_kernel(caplog: pytest.LogCaptureFixture) -> None:
    network, batch = build(ZOO["attention"])
    with caplog.at_level(logging.INFO, logger="maml_pipeline"):
        Learn2LearnEngine().meta_gradient(network, mse_loss, batch, INNER_LOOPS["first"])
    assert not caplog.messages


def test_dropout_draws_the_same_masks_as_plain_autograd() -> None:
    network, batch = build(ZOO["dropout"])
    inner = INNER_LOOPS["first"]
    torch.manual_seed(5)
    actual = Learn2LearnEngine().meta_gradient(network, mse_loss, batch, inner).gradient
    torch.manual_seed(5)
    with preserve_state(network):
        plain_autograd = PlainAutograd(network, mse_loss, Workarounds())
        theta = {name: p.detach().clone() for name, p in network.named_parameters()}
        expected = plain_autograd.meta_gradient(theta, batch, inner).gradient
    for name, g in expected.items():
        torch.testing.assert_close(actual[name], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(5))
def test_single_precision_networks_with_kinks_are_accepted(seed: int, engine: str) -> None:
    torch.manual_seed(seed)
    x = (torch.rand(2, 3, 6, 1, 28, 28) > 0.9).float()  # large areas of one value, as in Omniglot
    y = torch.arange(3).repeat(3, 2)
    for network in (ConvNet(3, filters=8), ConvNet(3, filters=8, downsampling="max_pool")):
        for steps in (1, 5):
            ENGINES[engine].meta_gradient(
                network, nn.functional.cross_entropy, TaskBatch(x[0], y, x[1], y), InnerLoop(0.4, steps)
            )


def test_a_copy_is_compared_when_parameters_may_not_change_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    accumulators = []
    for name in ("tanh", "lambda", "list"):
        network, batch = build(ZOO[name])
        network.float()
        parameter = next(network.parameters())
        accumulators.append(parameter.view_as(parameter).grad_fn.next_functions[0][0])  # type: ignore[union-attr]
        ENGINES["learn2learn"].meta_gradient(
            network, mse_loss, TaskBatch(*(t.float() for t in batch)), UNROLLED
        )
        assert parameter.view_as(parameter).grad_fn.next_functions[0][0] is accumulators[-1]  # type: ignore[union-attr]
    for name in ("dict of parameters", "hook over a parameter"):
        network, batch = build(ZOO[name])
        with pytest.raises(UserError, match="read parameters from the attributes"):
            ENGINES["learn2learn"].meta_gradient(network, mse_loss, batch, UNROLLED)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["tanh", "padding", "attention", "ConvNet"])
def test_mixed_precision_is_checked_in_double_precision(name: str, engine: str) -> None:
    network, batch = build(ZOO[name])
    network.float()
    batch = TaskBatch(*(t.float() if t.is_floating_point() else t for t in batch))
    exact = ENGINES[engine].meta_gradient(network, ZOO[name].loss, batch, UNROLLED).gradient
    network, _ = build(ZOO[name])
    network.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ENGINES[engine].meta_gradient(network, ZOO[name].loss, batch, UNROLLED).gradient
    norms = [
        float(torch.stack([g.float().norm() for g in gradient.values()]).norm())
        for gradient in (exact, rounded)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


@pytest.mark.parametrize("order", INNER_LOOPS)
def test_a_wrong_batching_rule_is_rejected(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workarounds, "PaddingMask", nullcontext)  # leaves vmap's own rule
    network, batch = build(ZOO["padding"])
    message = r"wrong meta-gradient for network Tokens, .* % off plain autograd's at embedding\.weight"
    with pytest.raises(UserError, match=message):
        VectorizedEngine().meta_gradient(network, mse_loss, batch, INNER_LOOPS[order])


@pytest.mark.parametrize("wrong", [0.999, 1.001])
def test_a_gradient_that_is_off_by_a_thousandth_is_rejected(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = vectorized_engine.META_GRADIENT.compute

    def compute(*arguments: Any) -> LossesAndGradient:
        result = right(*arguments)
        bias = next(name for name in result.gradient if name.endswith("bias"))
        return result._replace(gradient=result.gradient | {bias: wrong * result.gradient[bias]})

    computation = vectorized_engine.META_GRADIENT._replace(compute=compute)
    monkeypatch.setattr(vectorized_engine, "META_GRADIENT", computation)
    network, batch = build(ZOO["relu"])
    with pytest.raises(UserError, match=r"0\.1 % off plain autograd's at 0\.bias"):
        VectorizedEngine().meta_gradient(network, mse_loss, batch, UNROLLED)
