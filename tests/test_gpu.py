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
from tests.helpers import CONFIGS
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case, inner_loop, relative_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


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
        return peak_bytes(lambda: VECTORIZED.meta_gradient(network, cross_entropy, batch, inner), "cuda")

    assert peak(10, "checkpointed") - peak(3, "checkpointed") == pytest.approx(2 * theta, rel=0.01)
    assert peak(10, "checkpointed") < 0.3 * peak(10, "second")


@pytest.mark.parametrize("order", ["first", "truncated-1", "second", "checkpointed", "hessian-free"])
def test_a_meta_gradient_never_waits_for_the_device(order: str) -> None:
    network = ConvNet(5).cuda()
    x, y = torch.rand(2, 4, 5, 1, 28, 28), torch.arange(5).repeat(4, 1)
    batch, inner = on_cuda(TaskBatch(x[0], y, x[1], y)), inner_loop(order, 0.1, 2)
    VECTORIZED.meta_gradient(network, cross_entropy, batch, inner, accuracy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        VECTORIZED.meta_gradient(network, cross_entropy, batch, inner, accuracy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gpu_overlay_trains(maml: Any, tmp_path: Path) -> None:
    configs = ("--config", CONFIGS / "toy.yaml", "--config", CONFIGS / "gpu.yaml")
    maml("fit", *configs, "--trainer.max_steps", 5)
    assert (tmp_path / "runs" / "toy-second-s0" / "test.json").exists()
