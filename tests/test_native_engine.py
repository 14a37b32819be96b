"""Machine code computes what PyTorch does, for each network, loss and method that it knows."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import InnerLoop, Loss
from maml_pipeline.meta_gradient.native.batch import TaskLosses, batch_losses
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native_engine import known_network
from maml_pipeline.tasks import TaskBatch
from tests.native_cases import ENGINE, LOOPS, NETWORKS, REFERENCE, bits, case, threads
from tests.networks import relative_difference
from tests.oracles import PlainLoop, inner_product, linear_closed_form


@pytest.mark.parametrize("loss", [cross_entropy, mse_loss])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradients_are_those_of_autograd(name: str, loop: str, loss: Loss) -> None:
    network, batch = case(name, loss)
    metric = accuracy if loss is cross_entropy else None
    expected = REFERENCE.meta_gradient(network, loss, batch, LOOPS[loop], metric)
    actual = ENGINE.meta_gradient(network, loss, batch, LOOPS[loop], metric)
    assert [*actual.gradient] == [*expected.gradient]
    assert relative_difference(actual, expected) <= 1e-10
    torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=1e-12, atol=0)
    if metric is not None:
        assert actual.metric is not None and expected.metric is not None
        assert torch.equal(actual.metric, expected.metric)


@pytest.mark.parametrize("name", ["strided", "pooled, flattened", "mlp"])
def test_second_order_agrees_with_finite_differences(name: str) -> None:
    network, batch = case(name, cross_entropy)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    inner = InnerLoop(0.01, 2)
    expected = PlainLoop(network, cross_entropy, inner).slope(batch, direction, h=1e-6)
    gradient = ENGINE.meta_gradient(network, cross_entropy, batch, inner).gradient
    assert inner_product(gradient, direction) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 5, 11])
@pytest.mark.parametrize("first_order", [True, False])
def test_a_linear_network_agrees_with_the_closed_form(first_order: bool, steps: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 6, 2).double(), torch.randn(2, 3, 6, 1).double()
    batch, linear = TaskBatch(x[0], y[0], x[1], y[1]), nn.Linear(2, 1).double()
    inner = InnerLoop(0.1, steps, first_order)
    actual = ENGINE.meta_gradient(nn.Sequential(linear), mse_loss, batch, inner).gradient
    flat = torch.cat([g.flatten() for g in actual.values()])
    expected = linear_closed_form(linear, batch, inner)
    assert (flat - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_evaluations_are_those_of_autograd(name: str, transductive: bool) -> None:
    network, batch = case(name, cross_entropy)
    network.eval()
    inner = InnerLoop(0.1, 3)
    measures: dict[str, Loss] = {"loss": cross_entropy, "accuracy": accuracy}
    with torch.inference_mode():
        expected, actual = (
            engine.adaptation_curves(network, measures, cross_entropy, batch, inner, transductive)
            for engine in (REFERENCE, ENGINE)
        )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    support = batch.support_x[0], batch.support_y[0]
    adapted = ENGINE.adapted_parameters(network, cross_entropy, *support, inner)
    expected = REFERENCE.adapted_parameters(network, cross_entropy, *support, inner)
    torch.testing.assert_close(adapted, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["strided", "mlp"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    network, batch = case(name, cross_entropy, tasks=70, dtype=torch.float32)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            results.append(ENGINE.meta_gradient(network, cross_entropy, batch, InnerLoop(0.1, 2)))
    for result in results[1:]:
        assert all(map(torch.equal, bits(result), bits(results[0])))


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_the_other_tasks_change_no_bit_of_a_task(name: str) -> None:
    network, batch = case(name, cross_entropy, tasks=40, dtype=torch.float32)
    inner = InnerLoop(0.1, 2)
    together = ENGINE.meta_gradient(network, cross_entropy, batch, inner).inner_losses
    for task in (0, 1, 39):
        alone = TaskBatch(*(tensor[task : task + 1] for tensor in batch))
        losses = ENGINE.meta_gradient(network, cross_entropy, alone, inner).inner_losses
        assert torch.equal(losses[0], together[task])


@pytest.mark.parametrize("name", ["strided", "pooled", "mlp"])
def test_float32_rounds_like_autograd(name: str) -> None:
    network, batch = case(name, cross_entropy)
    inner = InnerLoop(0.01, 2)
    exact = ENGINE.meta_gradient(network, cross_entropy, batch, inner)
    network, batch = case(name, cross_entropy, dtype=torch.float32)
    network.load_state_dict(case(name, cross_entropy)[0].state_dict())
    batch = TaskBatch(*(t.float() if t.is_floating_point() else t for t in case(name, cross_entropy)[1]))
    errors = [
        max((g.double() - exact.gradient[name]).norm() for name, g in result.gradient.items())
        for result in (
            engine.meta_gradient(network, cross_entropy, batch, inner) for engine in (ENGINE, REFERENCE)
        )
    ]
    assert errors[0] <= 4 * errors[1]


def test_a_loss_that_is_not_finite_is_returned() -> None:
    network, batch = case("strided", mse_loss)
    result = ENGINE.meta_gradient(network, mse_loss, batch, InnerLoop(1e200, 3, first_order=True))
    assert not result.loss.isfinite()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loop", ["first order", "unrolled"])
@pytest.mark.parametrize("part", ["support_x", "query_x"])
def test_one_number_of_a_task_that_is_not_finite_is_seen_in_the_loss(
    name: str, loop: str, part: str
) -> None:
    network, batch = case(name, cross_entropy)
    getattr(batch, part)[0, 0].view(-1)[0] = torch.nan
    assert known_network(network, cross_entropy, batch, LOOPS[loop]) is not None
    assert not ENGINE.meta_gradient(network, cross_entropy, batch, LOOPS[loop]).loss.isfinite()


# Losses alone ----------------------------------------------------------------------------------------


def losses_run_as_machine_code(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tasks of each call."""
    calls: list[int] = []

    def counted(network: FeedForward, theta: Tensor, x: Tensor, y: Tensor) -> TaskLosses:
        calls.append(len(x))
        return batch_losses(network, theta, x, y)

    monkeypatch.setattr("maml_pipeline.meta_gradient.native.chunk_losses.batch_losses", counted)
    return calls


@pytest.mark.parametrize("loss", [cross_entropy, mse_loss])
@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_free_meta_gradients_are_those_of_exact_second_order(
    name: str, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = losses_run_as_machine_code(monkeypatch)
    network, tasks = case(name, loss)
    inner = InnerLoop(0.1, 3, method="hessian_free")
    actual = ENGINE.meta_gradient(network, loss, tasks, inner)
    assert calls == [3] * len(calls), "not machine code"
    assert len(calls) >= 3 + 1 + 3 * 3
    expected = REFERENCE.meta_gradient(network, loss, tasks, InnerLoop(0.1, 3))
    assert relative_difference(actual, expected) < 1e-5
    assert torch.allclose(actual.inner_losses, expected.inner_losses, rtol=1e-10)


@pytest.mark.parametrize("name", ["strided", "pooled, flattened", "mlp"])
def test_learned_rates_have_the_gradients_of_autograd_in_first_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = losses_run_as_machine_code(monkeypatch)
    network, tasks = case(name, cross_entropy)
    rates = {n: torch.rand(2, dtype=torch.float64) for n, _ in network.named_parameters()}
    inner = InnerLoop(0.1, 3, first_order=True, rates=rates)
    actual = ENGINE.meta_gradient(network, cross_entropy, tasks, inner)
    assert calls, "not machine code"
    expected = REFERENCE.meta_gradient(network, cross_entropy, tasks, inner)
    assert relative_difference(actual, expected) < 1e-10
    for parameter, of_rates in expected.rates.items():
        assert torch.allclose(actual.rates[parameter], of_rates, rtol=1e-10, atol=1e-14)


def test_the_number_of_threads_changes_no_bit_of_losses() -> None:
    network, tasks = case("strided", cross_entropy, tasks=5, dtype=torch.float32)
    inner = InnerLoop(0.1, 2, method="hessian_free")
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(bits(ENGINE.meta_gradient(network, cross_entropy, tasks, inner)))
    assert all(map(torch.equal, *results))
