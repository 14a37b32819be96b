"""Compiled meta-gradients are the same, and a failed compilation continues uncompiled."""

import logging
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine, VectorizedEngine
from maml_pipeline.tasks import TaskBatch
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case, relative_difference
from tests.zoo import ZOO, build

compiles = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="there is no C++ compiler"
)
# Raised by the compiler's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.integration
@compiles
@pytest.mark.parametrize(
    "inner",
    [InnerLoop(0.1, 1), InnerLoop(0.1, 3, method="checkpointed"), InnerLoop(0.1, 2, first_order=True)],
)
def test_compiling_does_not_change_the_meta_gradient(inner: InnerLoop) -> None:
    network, loss, batch = case("tanh", VECTOR_NETWORKS["tanh"], tasks=5)
    expected = Learn2LearnEngine().meta_gradient(
        network, loss, batch, InnerLoop(0.1, inner.steps, inner.first_order)
    )
    engine = VectorizedEngine(tasks_per_chunk=2, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile failed")
        for _ in range(2):  # compiled, and called again
            actual = engine.meta_gradient(network, loss, batch, inner)
            assert relative_difference(actual, expected) <= 1e-10
            torch.testing.assert_close(actual.inner_losses, expected.inner_losses)


@pytest.mark.integration
@compiles
def test_compiled_code_follows_the_parameters_and_the_data() -> None:
    network, loss, batch = case("tanh", VECTOR_NETWORKS["tanh"], tasks=2)
    engine, inner = VectorizedEngine(compile=True), InnerLoop(0.1, 1)
    engine.meta_gradient(network, loss, batch, inner)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1)
    other = TaskBatch(*(tensor + 0.1 for tensor in batch))
    expected = Learn2LearnEngine().meta_gradient(network, loss, other, inner)
    assert relative_difference(engine.meta_gradient(network, loss, other, inner), expected) <= 1e-10


@pytest.mark.integration
@compiles
def test_evaluating_in_between_does_not_compile_again(caplog: pytest.LogCaptureFixture) -> None:
    network, loss, batch = case("linear", VECTOR_NETWORKS["linear"], tasks=2)
    engine, inner = VectorizedEngine(compile=True), InnerLoop(0.1, 1)
    with caplog.at_level(logging.INFO, logger="maml_pipeline"):
        for _ in range(3):
            engine.meta_gradient(network.train(), loss, batch, inner)
            engine.adaptation_curves(network.eval(), {"loss": loss}, loss, batch, inner)
    assert caplog.messages == ["compile: unrolled, once; this can take a minute"]


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_compiling_convolutional_networks(name: str) -> None:
    network, loss, batch = case(name, IMAGE_NETWORKS[name], tasks=3)
    for inner in (InnerLoop(0.1, 1), InnerLoop(0.1, 2, method="checkpointed")):
        expected = Learn2LearnEngine().meta_gradient(network, loss, batch, InnerLoop(0.1, inner.steps))
        actual = VectorizedEngine(compile=True).meta_gradient(network, loss, batch, inner)
        assert relative_difference(actual, expected) <= 1e-10


def failing_compile(*arguments: Any, **settings: Any) -> Callable[..., Any]:
    raise RuntimeError("no compiler here\nand a long explanation")


def test_a_failed_compilation_continues_uncompiled_after_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", failing_compile)
    network, loss, batch = case("tanh", VECTOR_NETWORKS["tanh"], tasks=2)
    engine, inner = VectorizedEngine(compile=True), InnerLoop(0.1, 2)
    expected = Learn2LearnEngine().meta_gradient(network, loss, batch, inner)
    with pytest.warns(
        UserWarning, match="torch.compile failed; continuing uncompiled: no compiler here$"
    ):
        first = engine.meta_gradient(network, loss, batch, inner)
    assert relative_difference(first, expected) <= 1e-10
    second = engine.meta_gradient(network, loss, batch, inner)  # a second warning would be an error
    assert relative_difference(second, expected) <= 1e-10


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.frozen(x)))
        return y


@pytest.mark.integration
@compiles
def test_compiled_code_follows_frozen_layers() -> None:
    network, loss, batch = case("frozen", Frozen, tasks=2)
    engine, inner = VectorizedEngine(compile=True), InnerLoop(0.1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.meta_gradient(network, loss, batch, inner)
        assert isinstance(network, Frozen)
        network.frozen.weight.add_(1.0)
        actual = engine.meta_gradient(network, loss, batch, inner)
    assert (
        relative_difference(actual, Learn2LearnEngine().meta_gradient(network, loss, batch, inner))
        <= 1e-10
    )


@pytest.mark.integration
@compiles
def test_compiling_and_the_automatic_chunk_size_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    network, loss, batch = case("linear", VECTOR_NETWORKS["linear"], tasks=4)
    inner = InnerLoop(0.1, 1)
    expected = Learn2LearnEngine().meta_gradient(network, loss, batch, inner)
    with caplog.at_level(logging.INFO, logger="maml_pipeline"):
        engine = VectorizedEngine("auto", compile=True)
        actual = engine.meta_gradient(network, loss, batch, inner)
    assert relative_difference(actual, expected) <= 1e-10
    own = [record for record in caplog.records if record.name.startswith("maml_pipeline")]
    chunks, compiling = (record.getMessage() for record in own)
    assert chunks.startswith("tasks_per_chunk: auto is 4 of 4 tasks")
    assert compiling == "compile: unrolled, once; this can take a minute"


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", ["padding", "attention", "activation stored"])
def test_workarounds_are_compiled(name: str) -> None:
    network, batch = build(ZOO[name])
    inner = InnerLoop(0.1, 1)
    expected = Learn2LearnEngine().meta_gradient(network, mse_loss, batch, inner)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.compile failed")
        actual = VectorizedEngine(compile=True).meta_gradient(network, mse_loss, batch, inner)
    assert relative_difference(actual, expected) <= 1e-10
