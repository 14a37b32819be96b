"""A CUDA device computes the same meta-gradients and the same training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from maml_pipeline import TaskBatch
from maml_pipeline.learner import accuracy
from maml_pipeline.meta_gradient import (
    Engine,
    InnerLoop,
    Learn2LearnEngine,
    VectorizedEngine,
)
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import ConvNet
from tests.helpers import CONFIGS
from tests.networks import IMAGE_NETWORKS, VECTOR_NETWORKS, case, relative_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


VECTORIZED, CHUNKS = VectorizedEngine(), VectorizedEngine(tasks_per_chunk=1)


def on_cuda(batch: TaskBatch) -> TaskBatch:
    return TaskBatch(*(tensor.cuda() for tensor in batch))


@pytest.mark.parametrize("engine", [Learn2LearnEngine(), VECTORIZED, CHUNKS])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("name", ["strided", "max_pool", "batch_norm", "relu"])
def test_the_device_does_not_change_the_meta_gradient(
    name: str, first_order: bool, checkpointed: bool, engine: Engine
) -> None:
    network, loss, batch = case(name, (IMAGE_NETWORKS | VECTOR_NETWORKS)[name], tasks=3)
    inner = InnerLoop(0.05, 3, first_order, checkpointed)
    expected = Learn2LearnEngine().meta_gradient(network, loss, batch, InnerLoop(0.05, 3, first_order))
    actual = engine.meta_gradient(network.cuda(), loss, on_cuda(batch), inner)
    on_cpu = actual._replace(gradient={name: g.cpu() for name, g in actual.gradient.items()})
    assert relative_difference(on_cpu, expected) <= 1e-9


def test_checkpointed_memory_grows_by_the_parameter_checkpoints() -> None:
    network = ConvNet(5).cuda()
    x, y = torch.rand(2, 1, 5, 1, 28, 28), torch.arange(5)[None]
    batch = on_cuda(TaskBatch(x[0], y, x[1], y))
    theta = sum(p.numel() * p.element_size() for p in network.parameters())

    def peak(steps: int, checkpointed: bool) -> int:
        inner = InnerLoop(0.1, steps, checkpointed=checkpointed)
        VECTORIZED.meta_gradient(network, cross_entropy, batch, inner)
        return peak_bytes(lambda: VECTORIZED.meta_gradient(network, cross_entropy, batch, inner), "cuda")

    assert peak(10, True) - peak(3, True) == pytest.approx(2 * theta, rel=0.01)
    assert peak(10, True) < 0.3 * peak(10, False)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_meta_gradient_never_waits_for_the_device(checkpointed: bool) -> None:
    network = ConvNet(5).cuda()
    x, y = torch.rand(2, 4, 5, 1, 28, 28), torch.arange(5).repeat(4, 1)
    batch, inner = on_cuda(TaskBatch(x[0], y, x[1], y)), InnerLoop(0.1, 2, checkpointed=checkpointed)
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
