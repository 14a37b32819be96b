"""What needs a CUDA device: the same meta-gradients and the same training there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import TaskBatch
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine, Loss
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import SineWaves
from tests.conftest import CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_the_device_does_not_change_the_meta_gradient(network: str, first_order: bool) -> None:
    inner = InnerLoop(0.05, 3, first_order)
    if network == "mlp":
        module: torch.nn.Module = MLP().double()
        loss: Loss = mse_loss
        batch = TaskBatch(*(t.double() for t in SineWaves().batch(0, "train", range(4))))
    else:
        module = ConvNet(3, filters=8).double()
        loss = cross_entropy
        images, labels = torch.rand(2, 6, 1, 28, 28, dtype=torch.float64), torch.arange(6) % 3
        batch = TaskBatch(images, labels.repeat(2, 1), images.flip(0), labels.repeat(2, 1))
    on_cpu = Learn2LearnEngine().meta_gradient(module, loss, batch, inner).gradient
    on_cuda = (
        Learn2LearnEngine()
        .meta_gradient(module.cuda(), loss, TaskBatch(*(tensor.cuda() for tensor in batch)), inner)
        .gradient
    )
    for name, gradient in on_cpu.items():
        torch.testing.assert_close(on_cuda[name].cpu(), gradient, rtol=1e-9, atol=1e-12)


def test_the_gpu_overlay_trains(maml: Any, tmp_path: Path) -> None:
    configs = ("--config", CONFIGS / "toy.yaml", "--config", CONFIGS / "gpu.yaml")
    maml("fit", *configs, "--trainer.max_steps", 5)
    assert (tmp_path / "runs" / "toy-second-s0" / "test.json").exists()
