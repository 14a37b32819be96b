"""A captured meta-gradient is the one that would be computed, whatever changes between two replays.

A trace of tensor operations takes the place of a CUDA graph: like one, it repeats the operations of one
call on the same memory, and no Python code.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.meta_gradient import InnerLoop, Loss, MetaGradient, VectorizedEngine
from maml_pipeline.meta_gradient.captured import Call, Capture, CapturedCalls, python_state
from maml_pipeline.tasks import SineWaves
from maml_pipeline.torch_internals import copy_each, tensors_of
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case, inner_loop
from tests.probed_training import train

NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS
ORDERS = ["first", "truncated-1", "second", "checkpointed", "hessian-free"]


class Traces:
    """Stands in for `CudaGraphs` on a CPU.

    Attributes:
        captured: Number of calls that were captured.
        replayed: Number of replays.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, call: Call, arguments: list[Tensor]) -> Capture:
        self.captured += 1
        trace = make_fx(lambda *tensors: call([*tensors]))(*arguments)
        results = trace(*arguments)

        def replay() -> None:
            self.replayed += 1
            copy_each(tensors_of(results)[0], tensors_of(trace(*arguments))[0])

        return Capture(results, replay)


def capturing(tasks_per_chunk: int | None = None) -> tuple[VectorizedEngine, Traces]:
    engine, traces = VectorizedEngine(tasks_per_chunk), Traces()
    engine.captured_calls = CapturedCalls(traces, device="cpu")
    return engine, traces


def tensors(result: MetaGradient) -> list[Tensor]:
    return tensors_of([result.loss, result.inner_losses, result.gradient, result.rates])[0]


def assert_same(actual: MetaGradient, expected: MetaGradient) -> None:
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def other_tasks(batch: TaskBatch, seed: int) -> TaskBatch:
    """Return tasks with other inputs and the same targets."""
    torch.manual_seed(seed)
    return batch._replace(
        support_x=torch.rand_like(batch.support_x), query_x=torch.rand_like(batch.query_x)
    )


def descend(network: nn.Module, gradient: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, g in gradient.items():
            network.get_parameter(name).sub_(0.1 * g)


IMAGES = ["strided", "max_pool"]
"""Networks whose trace takes long."""


@pytest.mark.parametrize(
    ("name", "order", "tasks_per_chunk"),
    [("tanh", order, tasks) for order in ORDERS for tasks in (None, 2)]
    + [("strided", "first", 2)]
    + [
        pytest.param(name, order, tasks, marks=pytest.mark.exhaustive)
        for name in IMAGES
        for order in ORDERS
        for tasks in (None, 2)
    ],
)
def test_training_by_replays_is_training(name: str, order: str, tasks_per_chunk: int | None) -> None:
    network, loss, batch = case(name, NETWORKS[name], tasks=3)
    inner = inner_loop(order, 0.05, 2)
    engine, traces = capturing(tasks_per_chunk)
    for step in range(5):
        batch = other_tasks(batch, step)
        actual = engine.meta_gradient(network, loss, batch, inner)
        assert_same(actual, VectorizedEngine(tasks_per_chunk).meta_gradient(network, loss, batch, inner))
        descend(network, actual.gradient)
    assert (traces.captured, traces.replayed) == (1, 3)


def test_results_are_not_overwritten_by_the_next_replay() -> None:
    network, loss, batch = case("tanh", NETWORKS["tanh"], tasks=3)
    engine, _ = capturing()
    inner = inner_loop("second", 0.05, 2)
    kept = [engine.meta_gradient(network, loss, other_tasks(batch, s), inner) for s in range(5)]
    for seed, result in enumerate(kept):
        tasks = other_tasks(batch, seed)
        assert_same(result, VectorizedEngine().meta_gradient(network, loss, tasks, inner))


class Scaled(nn.Module):
    """A network whose Python code depends on attributes of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.activation: nn.Module = nn.Tanh()
        self.scale, self.powers, self.offset = 1.0, [1, 1], torch.ones(1).double()
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.activation(self.layer(x)) ** self.powers[0] * self.frozen
        return y + self.shift + self.offset


def change_attribute(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.scale *= 2
    return inner


def change_a_list(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.powers[0] += 1
    return inner


def replace_a_layer(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.activation = nn.Sigmoid() if type(network.activation) is nn.Tanh else nn.Tanh()
    return inner


def replace_a_plain_tensor(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.offset = network.offset + 1
    return inner


def change_a_plain_tensor(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.offset += 1
    return inner


def add_a_hook(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.layer.register_forward_hook(lambda module, given, y: 2 * y)
    return inner


def change_buffer_in_place(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.shift.add_(1)
    return inner


def change_frozen_parameter(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.frozen.mul_(2)
    return inner


def change_memory_of_a_parameter(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.layer.weight.data = 2 * network.layer.weight.data
    return inner


def load_a_state(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.load_state_dict({name: 2 * t for name, t in network.state_dict().items()})
    return inner


def change_the_inner_learning_rate(network: Scaled, inner: InnerLoop) -> InnerLoop:
    return replace(inner, lr=2 * inner.lr)


def change_the_order(network: Scaled, inner: InnerLoop) -> InnerLoop:
    return inner.in_first_order() if not inner.first_order else inner.in_second_order()


def change_learned_rates(network: Scaled, inner: InnerLoop) -> InnerLoop:
    rates = inner.rates or {
        name: torch.full((2,), 0.1).double() for name in ("layer.weight", "layer.bias")
    }
    for rate in rates.values():
        rate.mul_(1.5)
    return replace(inner, rates=rates)


def train_in_evaluation_mode(network: Scaled, inner: InnerLoop) -> InnerLoop:
    network.train(not network.training)
    return inner


@pytest.mark.parametrize(
    "change",
    [
        change_attribute,
        change_a_list,
        replace_a_layer,
        replace_a_plain_tensor,
        change_a_plain_tensor,
        add_a_hook,
        change_buffer_in_place,
        change_frozen_parameter,
        change_memory_of_a_parameter,
        load_a_state,
        change_the_inner_learning_rate,
        change_the_order,
        change_learned_rates,
        train_in_evaluation_mode,
    ],
)
def test_what_changes_between_replays_counts(change: Callable[[Any, InnerLoop], InnerLoop]) -> None:
    torch.manual_seed(0)
    network, inner = Scaled().double(), InnerLoop(0.1, 2)
    batch = TaskBatch(*(torch.randn(3, 4, size).double() for size in (3, 1, 3, 1)))
    engine, traces = capturing()
    for _ in range(3):
        for _ in range(4):
            actual = engine.meta_gradient(network, mse_loss, batch, inner)
            assert_same(actual, VectorizedEngine().meta_gradient(network, mse_loss, batch, inner))
        inner = change(network, inner)
    assert traces.captured >= 1 and traces.replayed >= 6


class ScaledLoss:
    """A loss with a number, which is no module."""

    scale = 1.0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * mse_loss(prediction, target)


class Criterion:
    """A loss that is a method of an object with numbers of several kinds."""

    def __init__(self) -> None:
        self.scale, self.settings = 1.0, SimpleNamespace(scale=1.0)
        self.array, self.chosen = np.ones(2), {1}

    def compute(self, prediction: Tensor, target: Tensor) -> Tensor:
        scale = self.scale * self.settings.scale * float(self.array[0]) * max(self.chosen)
        loss: Tensor = scale * mse_loss(prediction, target)
        return loss


def scaled_loss(prediction: Tensor, target: Tensor, scale: float) -> Tensor:
    return scale * mse_loss(prediction, target)


def changing_losses() -> dict[str, tuple[Loss, Callable[[], object]]]:
    """Return losses by name, each with a function that changes a number of it."""
    plain, partly = ScaledLoss(), partial(scaled_loss, scale=1.0)
    number, namespace, array, chosen = (Criterion() for _ in range(4))
    return {
        "attribute": (plain, lambda: vars(plain).update(scale=plain.scale + 1)),
        "keyword": (partly, lambda: partly.keywords.update(scale=partly.keywords["scale"] + 1)),
        "of a method": (number.compute, lambda: vars(number).update(scale=number.scale + 1)),
        "in a namespace": (namespace.compute, lambda: vars(namespace.settings).update(scale=2.0)),
        "in an array": (array.compute, lambda: array.array.__iadd__(1)),
        "in a set": (chosen.compute, lambda: chosen.chosen.add(len(chosen.chosen) + 1)),
    }


@pytest.mark.parametrize("name", changing_losses())
def test_a_number_of_a_loss_may_change(name: str) -> None:
    network, _, batch = case("tanh", NETWORKS["tanh"], tasks=3)
    (engine, traces), inner = capturing(), inner_loop("second", 0.05, 1)
    loss, change = changing_losses()[name]
    for _ in range(2):
        for _ in range(4):
            actual = engine.meta_gradient(network, loss, batch, inner)
            assert_same(actual, VectorizedEngine().meta_gradient(network, loss, batch, inner))
        change()
    assert traces.captured == 2


def test_a_key_keeps_what_it_identifies() -> None:
    owner = Criterion()
    owner.chosen = lambda x: x  # type: ignore[assignment]
    key, reference = python_state(owner), weakref.ref(owner.chosen)
    owner.chosen = lambda x: x  # type: ignore[assignment]
    assert reference() is not None, "another object could get its identity"
    assert python_state(owner) != key == key
    owner.settings.itself = owner.settings
    assert python_state(owner) == python_state(owner)


def test_another_number_of_tasks_is_another_capture() -> None:
    network, loss, batch = case("tanh", NETWORKS["tanh"], tasks=3)
    engine, traces = capturing()
    for tasks in (3, 3, 3, 2, 3, 2, 2, 2, 3):
        few = TaskBatch(*(tensor[:tasks] for tensor in batch))
        actual = engine.meta_gradient(network, loss, few, inner_loop("second", 0.05, 1))
        expected = VectorizedEngine().meta_gradient(network, loss, few, inner_loop("second", 0.05, 1))
        assert_same(actual, expected)
    assert (traces.captured, traces.replayed) == (2, 4)


def add(given: Tensor, live: Tensor) -> Tensor:
    return given + live


def refuse(call: Call, arguments: list[Tensor]) -> Capture:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_call_that_finds_too_little_memory_is_made_without_the_captures() -> None:
    traces, one = Traces(), torch.ones(1)
    calls = CapturedCalls(traces, device="cpu")

    def needs_all_memory() -> int:
        if calls.kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 3

    for _ in range(3):
        calls(0, add, one, one)
    assert len(calls.kept) == 1
    assert calls.with_memory(needs_all_memory) == 3
    with pytest.raises(torch.OutOfMemoryError):
        calls.with_memory(too_large)


def too_large() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_calls_that_take_turns_are_never_captured() -> None:
    traces, one = Traces(), torch.ones(1)
    calls = CapturedCalls(traces, device="cpu")
    for key in (1, 2, 1, 2, 1):
        assert calls(key, add, one, one) == 2
    assert traces.captured == 0


def test_a_call_that_cannot_be_captured_is_made_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    calls, one = CapturedCalls(refuse, device="cpu"), torch.ones(1)
    assert [calls(0, add, n * one, one).item() for n in range(4)] == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "the meta-gradient is not captured as a CUDA graph: operation not permitted when stream is "
        "capturing"
    ]


def test_the_oldest_captures_are_freed() -> None:
    traces, one = Traces(), torch.ones(1)
    calls = CapturedCalls(traces, device="cpu")
    for key in [n for number in range(6) for n in (number, number, number)]:
        calls(key, add, one, one)
    assert traces.captured == 6 and len(calls.kept) == 2
    calls(5, add, one, one)
    calls(0, add, one, one)
    assert traces.captured == 6


def test_forgetting_starts_anew() -> None:
    traces, one = Traces(), torch.ones(1)
    calls = CapturedCalls(traces, device="cpu")
    for forgets in (False, False, False, True, False, False):
        if forgets:
            calls.forget()
        assert calls(0, add, one, one) == 2
    assert (traces.captured, traces.replayed) == (2, 2)


def test_a_memory_probe_measures_a_meta_step_that_is_not_replayed() -> None:
    figures, traces = [], Traces()
    for captured in (CapturedCalls(refuse), CapturedCalls(traces, device="cpu")):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01, engine="vectorized")
        assert isinstance(learner.engine, VectorizedEngine)
        learner.engine.captured_calls = captured
        probes = ProbeSettings(every=4, speed=False, order_gap=False)
        figures.append(train(learner, SineWaves(), probes, steps=14))
    names = ("memory/meta_step_peak_bytes", "memory/parameters_bytes")
    one, other = ([{name: step[name] for name in names} for step in of.values()] for of in figures)
    assert one == other and len(one) == 4
    assert (traces.captured, traces.replayed) == (3, 4)
