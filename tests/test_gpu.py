"""A CUDA device computes the same meta-gradients and the same training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from maml_pipeline import TaskBatch
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import (
    Engine,
    Learn2LearnEngine,
    VectorizedEngine,
)
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import ConvNet
from maml_pipeline.networks.trilinear_form import WAYS, Operand, TrilinearForm, fastest_way
from tests.helpers import CONFIGS
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case, inner_loop, relative_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


EVERY_ORDER = ["first", "truncated-1", "second", "checkpointed", "hessian-free"]
VECTORIZED, CHUNKS = VectorizedEngine(), VectorizedEngine(tasks_per_chunk=1)


def on_cuda(batch: TaskBatch) -> TaskBatch:
    return TaskBatch(*(tensor.cuda() for tensor in batch))


@pytest.mark.parametrize("engine", [Learn2LearnEngine(), VECTORIZED, CHUNKS])
@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed"])
@pytest.mark.parametrize("name", ["strided", "max_pool", "batch_norm", "relu"])
def test_the_device_does_not_change_the_meta_gradient(name: str, order: str, engine: Engine) -> None:
    network, loss, batch = case(name, (IMAGE_NETWORKS | VECTOR_NETWORKS)[name], tasks=3)
    inner = inner_loop(order, 0.05, 3)
    unrolled = replace(inner, method="unrolled")
    expected = Learn2LearnEngine().meta_gradient(network, loss, batch, unrolled)
    actual = engine.meta_gradient(network.cuda(), loss, on_cuda(batch), inner)
    on_cpu = actual._replace(gradient={name: g.cpu() for name, g in actual.gradient.items()})
    assert relative_difference(on_cpu, expected) <= 1e-9


def test_checkpointed_memory_grows_by_the_parameter_checkpoints() -> None:
    network = ConvNet(5).cuda()
    x, y = torch.rand(2, 1, 5, 1, 28, 28), torch.arange(5)[None]
    batch = on_cuda(TaskBatch(x[0], y, x[1], y))
    theta = sum(p.numel() * p.element_size() for p in network.parameters())

    def peak(steps: int, order: str) -> int:
        inner = inner_loop(order, 0.1, steps)
        VECTORIZED.meta_gradient(network, cross_entropy, batch, inner)
        VECTORIZED.forget_captures()  # a replay allocates its results alone
        return peak_bytes(lambda: VECTORIZED.meta_gradient(network, cross_entropy, batch, inner), "cuda")

    assert peak(10, "checkpointed") - peak(3, "checkpointed") == pytest.approx(2 * theta, rel=0.01)
    assert peak(10, "checkpointed") < 0.3 * peak(10, "second")


def images(tasks: int) -> TaskBatch:
    x, y = torch.rand(2, tasks, 5, 1, 28, 28), torch.arange(5).repeat(tasks, 1)
    return on_cuda(TaskBatch(x[0], y, x[1], y))


@pytest.mark.parametrize("is_replayed", [False, True])
@pytest.mark.parametrize("order", EVERY_ORDER)
def test_a_meta_gradient_never_waits_for_the_device(order: str, is_replayed: bool) -> None:
    engine, network, batch, inner = (
        VectorizedEngine(),
        ConvNet(5).cuda(),
        images(4),
        inner_loop(order, 0.1, 2),
    )
    for _ in range(4):
        engine.meta_gradient(network, cross_entropy, batch, inner, accuracy)
    if not is_replayed:
        engine.forget_captures()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.meta_gradient(network, cross_entropy, batch, inner, accuracy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
@pytest.mark.parametrize("order", EVERY_ORDER)
def test_training_by_replays_is_training(order: str, tasks_per_chunk: int | None) -> None:
    engine, network, inner = (
        VectorizedEngine(tasks_per_chunk),
        ConvNet(5).cuda(),
        inner_loop(order, 0.1, 2),
    )
    for _ in range(5):
        batch = images(3)
        actual = engine.meta_gradient(network, cross_entropy, batch, inner)
        expected = VectorizedEngine(tasks_per_chunk).meta_gradient(network, cross_entropy, batch, inner)
        for name, g in actual.gradient.items():
            torch.testing.assert_close(g, expected.gradient[name], rtol=1e-4, atol=1e-6)
            network.get_parameter(name).data.sub_(0.01 * g)
    assert len(engine.captured_calls.kept) == 1


def test_captures_of_both_orders_take_turns() -> None:
    engine, network = VectorizedEngine(), ConvNet(5).cuda()
    for order in (*["first"] * 3, *["second"] * 3, "first", "second"):
        batch, inner = images(3), inner_loop(order, 0.1, 2)
        actual = engine.meta_gradient(network, cross_entropy, batch, inner)
        expected = VectorizedEngine().meta_gradient(network, cross_entropy, batch, inner)
        torch.testing.assert_close(actual.gradient, expected.gradient, rtol=1e-4, atol=1e-6)
    assert len(engine.captured_calls.kept) == 2


def test_a_capture_under_autocast_converts_the_parameters_anew() -> None:
    engine, network, inner = VectorizedEngine(), ConvNet(5).cuda(), inner_loop("second", 0.1, 1)
    for _ in range(4):
        batch = images(3)
        with torch.autocast("cuda", torch.bfloat16):
            actual = engine.meta_gradient(network, cross_entropy, batch, inner)
            expected = VectorizedEngine().meta_gradient(network, cross_entropy, batch, inner)
        torch.testing.assert_close(actual.inner_losses, expected.inner_losses, rtol=0.02, atol=0.02)
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("wrt", ["x", "w", "y"])
def test_a_way_of_convolving_is_chosen_by_timing(wrt: Operand) -> None:
    form = TrilinearForm((4, 5, 8, 14, 14), (4, 8, 8, 3, 3), 2, 1)
    shapes = {"x": form.x_shape, "w": form.w_shape, "y": (4, 5, 8, 7, 7)}
    first, second = (torch.randn(s, device="cuda") for name, s in shapes.items() if name != wrt)
    assert fastest_way(form, wrt, first, second) in WAYS
    expected = form.partial_derivative(wrt, first.cpu(), second.cpu())
    actual = form.partial_derivative(wrt, first, second)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-2, atol=1e-2)  # TF32, if it is on


def test_the_gpu_overlay_trains(maml: Any, tmp_path: Path) -> None:
    configs = ("--config", CONFIGS / "toy.yaml", "--config", CONFIGS / "gpu.yaml")
    maml("fit", *configs, "--trainer.max_steps", 5)
    assert (tmp_path / "runs" / "toy-second-s0" / "test.json").exists()
