"""Each engine, chunk size and method computes the same, exact meta-gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Learn2LearnEngine,
    NativeEngine,
    VectorizedEngine,
    build_engine,
)
from maml_pipeline.tasks import TaskBatch
from tests.networks import (
    IMAGE_NETWORKS,
    SMOOTH_NETWORKS,
    VECTOR_NETWORKS,
    case,
    flatten,
    inner_loop,
    relative_difference,
)
from tests.oracles import PlainLoop, inner_product, linear_closed_form

NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS
REFERENCE = Learn2LearnEngine()


@pytest.mark.exhaustive
@pytest.mark.parametrize("order", ["first", "truncated-1", "truncated-3", "second"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_chunks_and_checkpointing_agree(name: str, steps: int, order: str) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=4)
    if order == "truncated-3" and steps < 3:
        order = "truncated-0"
    unrolled = inner_loop(order, 0.1, steps)
    expected = REFERENCE.meta_gradient(network, loss, batch, unrolled)

    computations: dict[str, tuple[Engine, InnerLoop]] = {
        "vectorized": (VectorizedEngine(), unrolled),
        "one task a chunk": (VectorizedEngine(tasks_per_chunk=1), unrolled),
        "chunks that do not divide": (VectorizedEngine(tasks_per_chunk=3), unrolled),
    }
    if not unrolled.first_order:
        checkpointed = replace(unrolled, method="checkpointed")
        computations |= {
            "vectorized, checkpointed": (VectorizedEngine(), checkpointed),
            "chunks, checkpointed": (VectorizedEngine(tasks_per_chunk=3), checkpointed),
            "learn2learn, checkpointed": (REFERENCE, checkpointed),
        }
    for computation, (engine, inner) in computations.items():
        actual = engine.meta_gradient(network, loss, batch, inner)
        assert relative_difference(actual, expected) <= 1e-10, computation
        torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=1e-10, atol=0)
        assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", SMOOTH_NETWORKS)
def test_hessian_free_agrees_with_unrolled_second_order(name: str, steps: int, engine: Engine) -> None:
    network, loss, batch = case(name, SMOOTH_NETWORKS[name], tasks=3)
    for order in ("second", f"truncated-{max(1, steps - 1)}"):
        unrolled = inner_loop(order, 0.1, steps)
        expected = REFERENCE.meta_gradient(network, loss, batch, unrolled)
        actual = engine.meta_gradient(
            network, loss, batch, replace(unrolled, method=Method.HESSIAN_FREE)
        )
        difference = flatten(actual.gradient) - flatten(expected.gradient)
        assert difference.norm() <= 1e-5 * flatten(expected.gradient).norm()


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_engines_agree_for_any_number_of_tasks_and_on_the_metric(tasks: int) -> None:
    network, loss, batch = case("strided", IMAGE_NETWORKS["strided"], tasks)
    inner = InnerLoop(0.1, 2)
    expected = REFERENCE.meta_gradient(network, loss, batch, inner, accuracy)
    for engine in (VectorizedEngine(), VectorizedEngine(2), VectorizedEngine("auto")):
        actual = engine.meta_gradient(network, loss, batch, inner, accuracy)
        assert relative_difference(actual, expected) <= 1e-10
        assert actual.metric is not None and expected.metric is not None
        assert torch.equal(actual.metric, expected.metric)


@pytest.mark.parametrize("name", ["strided", "batch_norm", "relu"])
def test_engines_agree_on_the_adaptation_curves(name: str) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=5)
    network.eval()
    inner = InnerLoop(0.1, 3)
    expected = REFERENCE.adaptation_curves(network, {"loss": loss}, loss, batch, inner)["loss"]
    for engine in (VectorizedEngine(), VectorizedEngine(2)):
        with torch.inference_mode():
            curves = engine.adaptation_curves(network, {"loss": loss}, loss, batch, inner)
        assert curves["loss"].shape == (5, 4)
        torch.testing.assert_close(curves["loss"], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("engine", [VectorizedEngine(), VectorizedEngine(2), REFERENCE])
@pytest.mark.parametrize(
    ("order", "tolerance"),
    [
        *(("first", 1e-12), ("truncated-0", 1e-12), ("truncated-2", 1e-12), ("second", 1e-12)),
        *(("truncated-2-checkpointed", 1e-12), ("checkpointed", 1e-12)),
        # Differences of a linear gradient are exact but for rounding, some eps / (e |v|) = 2e-7.
        *(("truncated-2-hessian-free", 1e-6), ("hessian-free", 1e-6)),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 11])
def test_linear_networks_agree_with_the_closed_form(
    engine: Engine, order: str, tolerance: float, steps: int
) -> None:
    if order.startswith("truncated-2"):
        steps += 2
    torch.manual_seed(steps)
    for features, lr in ((1, 0.01), (2, 0.1), (4, 0.2)):
        x, y = torch.randn(2, 3, 6, features).double(), torch.randn(2, 3, 6, 1).double()
        batch, network = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(features, 1).double()
        inner = inner_loop(order, lr, steps)
        actual = flatten(engine.meta_gradient(network, mse_loss, batch, inner).gradient)
        expected = linear_closed_form(network, batch, inner)
        assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE])
@pytest.mark.parametrize(
    "order", ["truncated-1", "truncated-2", "second", "checkpointed", "hessian-free"]
)
@pytest.mark.parametrize("name", SMOOTH_NETWORKS)
def test_each_order_agrees_with_finite_differences_of_its_own_steps_alone(
    name: str, order: str, engine: Engine
) -> None:
    network, loss, batch = case(name, SMOOTH_NETWORKS[name], tasks=3)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}

    def slope(order: str) -> float:
        inner = inner_loop(order, 0.1, 3)
        return inner_product(engine.meta_gradient(network, loss, batch, inner).gradient, direction)

    difference = PlainLoop(network, loss, inner_loop(order, 0.1, 3)).slope(batch, direction, h=1e-5)
    # As against unrolled second order: a step of 1e-9 leaves differences of gradients some 1e-6.
    tolerance = 1e-5 if order == "hessian-free" else 1e-6
    assert slope(order) == pytest.approx(difference, rel=tolerance)
    others = {"first", "truncated-1", "truncated-2"} - {order}
    assert all(slope(other) != pytest.approx(difference, rel=1e-3) for other in others)


@pytest.mark.parametrize("engine", [VectorizedEngine(), VectorizedEngine(2), REFERENCE])
@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("name", ["strided", "relu", "tanh"])
def test_the_ends_of_the_scale_are_first_and_second_order_to_the_bit(
    name: str, method: Method, engine: Engine
) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)

    def gradient(inner: InnerLoop) -> list[torch.Tensor]:
        return [*engine.meta_gradient(network, loss, batch, inner).gradient.values()]

    for steps in (0, 1, 3):
        second = InnerLoop(0.1, steps, method=method)
        none, every = (replace(second, differentiated_steps=n) for n in (0, steps))
        assert all(map(torch.equal, gradient(none), gradient(second.in_first_order())))
        assert all(map(torch.equal, gradient(every), gradient(second)))


@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE])
@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed", "hessian-free"])
def test_nothing_is_left_in_grad_and_the_network_is_unchanged(engine: Engine, order: str) -> None:
    network, loss, batch = case("strided", IMAGE_NETWORKS["strided"], tasks=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = engine.meta_gradient(network, loss, batch, inner_loop(order, 0.1, 2))
    assert all(p.grad is None for p in network.parameters())
    assert not any(g.requires_grad for g in (*result.gradient.values(), result.inner_losses))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", ["first", "second", "checkpointed", "hessian-free"])
@pytest.mark.parametrize("name", ["strided", "tanh"])
@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE, NativeEngine()])
def test_a_meta_gradient_is_the_same_in_every_gradient_mode(
    engine: Engine, name: str, order: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    network, loss, batch = case(name, (IMAGE_NETWORKS | VECTOR_NETWORKS)[name], tasks=2)
    inner = inner_loop(order, 0.1, 2)
    expected = engine.meta_gradient(network, loss, batch, inner)
    flops = engine.flops(network, loss, batch, inner)
    with mode():
        made_there = TaskBatch(*(tensor.clone() for tensor in batch))
        actual = engine.meta_gradient(network, loss, made_there, inner)
        assert engine.flops(network, loss, made_there, inner) == flops > 0
    assert any(g.abs().max() > 0 for g in expected.gradient.values())
    assert all(map(torch.equal, actual.gradient.values(), expected.gradient.values()))
    assert torch.equal(actual.inner_losses, expected.inner_losses)


class FrozenUnusedAndShared(nn.Module):
    """A network with a frozen layer, an unused one, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.shared = nn.Linear(2, 2)
        self.also_shared = self.shared
        self.head = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.also_shared(torch.tanh(self.shared(self.frozen(x)))))
        return y


@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed", "hessian-free"])
def test_frozen_unused_and_shared_parameters(order: str) -> None:
    network, loss, batch = case("shared", FrozenUnusedAndShared, tasks=2)
    inner = inner_loop(order, 0.1, 2)
    expected = REFERENCE.meta_gradient(network, loss, batch, replace(inner, method="unrolled"))
    names = {"unused.weight", "unused.bias", "shared.weight", "shared.bias"}
    assert expected.gradient.keys() == names | {"head.weight", "head.bias"}
    assert expected.gradient["unused.weight"].abs().sum() == 0
    assert expected.gradient["shared.weight"].abs().sum() > 0
    for engine in (VectorizedEngine(), REFERENCE):
        actual = engine.meta_gradient(network, loss, batch, inner)
        assert relative_difference(actual, expected) <= (1e-6 if order == "hessian-free" else 1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "checkpoint"}, "method is checkpoint; it must be unrolled, checkpointed, hessian_f"),
        ({"differentiated_steps": 3}, "differentiated_steps is 3, but there are 2 inner_steps; give at"),
        ({"differentiated_steps": -1}, "differentiated_steps is -1; it must be at least 0"),
        ({"differentiated_steps": 0.5}, "differentiated_steps is 0.5; it must be a whole number"),
        ({"first_order": True, "differentiated_steps": 0}, "differentiated_steps is 0, but first_order"),
        ({"first_order": True, "method": "checkpointed"}, "method is checkpointed, but first_order is"),
    ],
)
def test_an_inner_loop_refuses_what_contradicts_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InnerLoop(0.1, 2, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vectorised"}, "engine is vectorised; it must be native, vectorized or learn2learn"),
        ({"name": "learn2learn", "tasks_per_chunk": 8}, "tasks_per_chunk is 8, but engine learn2learn"),
        ({"name": "vectorized", "tasks_per_chunk": 0}, "tasks_per_chunk is 0; it must be at least 1"),
    ],
)
def test_settings_that_an_engine_does_not_have_are_rejected(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_engine(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first_order", "remedy"), [(True, "layer$"), (False, "first_order to true$")])
@pytest.mark.parametrize("engine", [VectorizedEngine(), Learn2LearnEngine()])
def test_a_derivative_that_is_missing_only_in_training_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, first_order: bool, remedy: str
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError(message)

    network, loss, batch = case("linear", VECTOR_NETWORKS["linear"], tasks=2)
    inner = InnerLoop(0.1, 1, first_order)
    monkeypatch.setattr(type(engine), "_meta_gradient", fail)
    monkeypatch.setattr("maml_pipeline.meta_gradient.engine.verified_workarounds", lambda *_: None)
    message = "derivative for aten::cummax is not implemented. A second sentence."
    with pytest.raises(UserError, match=f"differentiate network .* is not implemented; .*{remedy}"):
        engine.meta_gradient(network, loss, batch, inner)
    message = "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.meta_gradient(network, loss, batch, inner)
