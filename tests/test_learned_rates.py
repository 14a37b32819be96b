"""Learned inner learning rates: one for each adapted parameter and inner step, meta-learned exactly."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, VectorizedEngine
from maml_pipeline.meta_gradient.inner_loop import adapted_names
from tests.networks import (
    IMAGE_NETWORKS,
    SMOOTH_NETWORKS,
    VECTOR_NETWORKS,
    case,
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
    "checkpointed": {"checkpointed": True},
}
PARTS: list[tuple[str, list[str] | None]] = [
    ("tanh", None),
    ("tanh", ["2.*"]),
    ("strided", ["head.*", "features.9.*"]),
    ("batch_norm", ["[05].*"]),
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
    assert largest_relative_difference(result.rates, slopes) <= 1e-6
    direction = {name: torch.randn_like(p) for name, p in oracle.theta.items()}
    difference = oracle.slope(batch, direction, h=1e-4)
    assert inner_product(result.gradient, direction) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["relu", "max_pool"])
def test_equal_rates_are_a_plain_inner_learning_rate(name: str, engine: str, method: str) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)
    inner = InnerLoop(0.1, 3, **METHODS[method])
    plain = ENGINES[engine].meta_gradient(network, loss, batch, inner)
    assert not plain.rates
    rates = {name: torch.full((3,), 0.1, dtype=torch.float64) for name, _ in network.named_parameters()}
    learned = ENGINES[engine].meta_gradient(network, loss, batch, replace(inner, rates=rates))
    assert relative_difference(learned, plain) <= 1e-10
    assert learned.rates.keys() == rates.keys()
    # The sum over a parameter's rates is the derivative along a common rate, in any engine.
    reference = ENGINES["learn2learn"].meta_gradient(network, loss, batch, replace(inner, rates=rates))
    assert largest_relative_difference(learned.rates, reference.rates) <= 1e-10


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
