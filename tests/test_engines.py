"""Each engine, chunk size and method computes the same, exact meta-gradient."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline.errors import UserError
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Learn2LearnEngine,
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
    relative_difference,
)
from tests.oracles import PlainLoop, inner_product, linear_closed_form

NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS
REFERENCE = Learn2LearnEngine()


@pytest.mark.exhaustive
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_engines_chunks_and_checkpointing_agree(name: str, steps: int, first_order: bool) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=4)
    unrolled = InnerLoop(0.1, steps, first_order)
    checkpointed = replace(unrolled, checkpointed=True)
    expected = REFERENCE.meta_gradient(network, loss, batch, unrolled)

    computations: dict[str, tuple[Engine, InnerLoop]] = {
        "vectorized": (VectorizedEngine(), unrolled),
        "one task a chunk": (VectorizedEngine(tasks_per_chunk=1), unrolled),
        "chunks that do not divide": (VectorizedEngine(tasks_per_chunk=3), unrolled),
        "vectorized, checkpointed": (VectorizedEngine(), checkpointed),
        "chunks, checkpointed": (VectorizedEngine(tasks_per_chunk=3), checkpointed),
        "learn2learn, checkpointed": (REFERENCE, checkpointed),
    }
    for computation, (engine, inner) in computations.items():
        actual = engine.meta_gradient(network, loss, batch, inner)
        assert relative_difference(actual, expected) <= 1e-10, computation
        torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=1e-10, atol=0)
        assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)


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
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 11])
def test_linear_networks_agree_with_the_closed_form(
    engine: Engine, checkpointed: bool, first_order: bool, steps: int
) -> None:
    torch.manual_seed(steps)
    for features, lr in ((1, 0.01), (2, 0.1), (4, 0.2)):
        x, y = torch.randn(2, 3, 6, features).double(), torch.randn(2, 3, 6, 1).double()
        batch, network = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(features, 1).double()
        inner = InnerLoop(lr, steps, first_order, checkpointed)
        actual = flatten(engine.meta_gradient(network, mse_loss, batch, inner).gradient)
        expected = linear_closed_form(network, batch, inner)
        assert (actual - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("name", SMOOTH_NETWORKS)
def test_only_second_order_agrees_with_finite_differences(
    name: str, checkpointed: bool, engine: Engine
) -> None:
    network, loss, batch = case(name, SMOOTH_NETWORKS[name], tasks=3)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    inner = InnerLoop(0.1, 3, checkpointed=checkpointed)

    def slope(first_order: bool) -> float:
        order = replace(inner, first_order=first_order)
        return inner_product(engine.meta_gradient(network, loss, batch, order).gradient, direction)

    difference = PlainLoop(network, loss, inner).slope(batch, direction, h=1e-5)
    assert slope(first_order=False) == pytest.approx(difference, rel=1e-6)
    assert slope(first_order=True) != pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("engine", [VectorizedEngine(), REFERENCE])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_nothing_is_left_in_grad_and_the_network_is_unchanged(
    engine: Engine, checkpointed: bool
) -> None:
    network, loss, batch = case("strided", IMAGE_NETWORKS["strided"], tasks=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = engine.meta_gradient(network, loss, batch, InnerLoop(0.1, 2, checkpointed=checkpointed))
    assert all(p.grad is None for p in network.parameters())
    assert not any(g.requires_grad for g in (*result.gradient.values(), result.inner_losses))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
def test_frozen_unused_and_shared_parameters(first_order: bool, checkpointed: bool) -> None:
    network, loss, batch = case("shared", FrozenUnusedAndShared, tasks=2)
    inner = InnerLoop(0.1, 2, first_order, checkpointed)
    expected = REFERENCE.meta_gradient(network, loss, batch, InnerLoop(0.1, 2, first_order))
    names = {"unused.weight", "unused.bias", "shared.weight", "shared.bias"}
    assert expected.gradient.keys() == names | {"head.weight", "head.bias"}
    assert expected.gradient["unused.weight"].abs().sum() == 0
    assert expected.gradient["shared.weight"].abs().sum() > 0
    for engine in (VectorizedEngine(), REFERENCE):
        actual = engine.meta_gradient(network, loss, batch, inner)
        assert relative_difference(actual, expected) <= 1e-10


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
