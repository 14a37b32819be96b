"""The memory probe measures a meta-step to the byte."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from pytorch_lightning.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.profiler import profile

from maml_pipeline import MetaLearner
from maml_pipeline.errors import UserError
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Lines, SineWaves, Task, TaskDistribution
from maml_pipeline.tasks.task import Split
from maml_pipeline.torch_internals import CpuAllocation, cpu_allocations
from tests.probed_training import ENGINES, ORDERS, train

pytestmark = pytest.mark.exhaustive

FLOAT = 4


class RandomImages(TaskDistribution):
    """Tasks with three classes and one image per class in each set."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        x = torch.rand(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(index))
        return Task(x[0], torch.arange(3), x[1], torch.arange(3))


def memory(
    network: nn.Module, tasks: TaskDistribution, loss: Any = cross_entropy, **settings: Any
) -> int:
    """Return the peak memory of the tenth meta-step in bytes."""
    learner = MetaLearner(network, loss=loss, inner_lr=0.01, **settings)
    figures = train(learner, tasks, ProbeSettings(speed=False, order_gap=False))
    return int(figures[9]["memory/meta_step_peak_bytes"])


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_memory_is_constant_in_the_inner_steps(engine: str) -> None:
    network = ConvNet(ways=3, filters=8)
    one, ten = (
        memory(network, RandomImages(), inner_steps=k, engine=engine, first_order=True) for k in (1, 10)
    )
    assert ten - one <= 9 * 2 * FLOAT  # one loss per step, stored twice


@pytest.mark.parametrize("engine", ENGINES)
def test_unrolled_memory_is_affine_in_the_inner_steps(engine: str) -> None:
    network = ConvNet(ways=3, filters=8)
    peaks = [memory(network, RandomImages(), inner_steps=k, engine=engine) for k in (2, 6, 10)]
    theta = sum(p.numel() * FLOAT for p in network.parameters())
    (grown, again) = [later - earlier for earlier, later in pairwise(peaks)]
    assert grown == again > 4 * theta


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointed_memory_grows_by_the_parameter_checkpoints(engine: str) -> None:
    network = ConvNet(ways=3, filters=8)
    theta = sum(p.numel() * FLOAT for p in network.parameters())

    def peak(steps: int) -> int:
        settings = {"inner_steps": steps, "engine": engine, "method": "checkpointed"}
        return memory(network, RandomImages(), **settings)

    base = peak(3)
    for steps in (4, 7, 11):
        grown = peak(steps) - base
        segments = longest_segment(steps) - longest_segment(3)
        assert 0 <= grown - segments * theta <= (steps - 3) * 2 * FLOAT


@pytest.mark.parametrize("order", ORDERS)
def test_memory_is_identical_at_every_probe_step(order: str) -> None:
    learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=3, **ORDERS[order])
    figures = train(learner, SineWaves(), ProbeSettings(every=7), steps=35, meta_batch_size=4)
    memories = [{k: v for k, v in f.items() if k.startswith("memory")} for f in figures.values()]
    assert len(memories) == 6 and all(found == memories[0] for found in memories)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", [*ENGINES, "native"])
def test_a_measured_meta_step_frees_nothing_that_is_older(
    engine: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch would warn on the user's terminal that it does not know the size. It records the event only
    # if it has seen the allocation: every meta-step is measured.
    unknown: list[CpuAllocation] = []

    def watched(profiler: profile) -> list[CpuAllocation]:
        known = set()
        for event in (events := cpu_allocations(profiler)):
            if event.size > 0:
                known.add(event.address)
            elif event.address in known:
                known.remove(event.address)
            else:
                unknown.append(event)
        return events

    monkeypatch.setattr("maml_pipeline.meta_gradient.memory.cpu_allocations", watched)
    settings: dict[str, Any] = {"engine": engine, "inner_lr": 0.01}
    learner = MetaLearner(MLP(), loss=mse_loss, metric=mse_loss, **settings)
    probes = ProbeSettings(every=1, speed=False, order_gap=False)
    lightning = {"accumulate_grad_batches": accumulate, "log_every_n_steps": 1}
    figures = train(learner, SineWaves(), probes, steps=12, **lightning)
    assert len(figures) == 9 and not unknown


def test_memory_held_before_a_meta_step_is_reported_separately() -> None:
    network = MLP()
    theta = sum(p.numel() * FLOAT for p in network.parameters())
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01)  # Adam by default
    held = train(learner, SineWaves(), ProbeSettings())[9]
    assert held["memory/parameters_bytes"] == theta
    assert held["memory/gradients_bytes"] == theta
    steps = FLOAT * len([*network.parameters()])  # Adam counts for each tensor
    assert held["memory/optimizer_bytes"] == 2 * theta + steps


def test_the_memory_probe_rejects_pytorchs_profiler() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    profiler = PyTorchProfiler()
    with pytest.raises(UserError, match=r"set probes\.memory to false"):
        train(learner, Lines(), ProbeSettings(), profiler=profiler)
    profiler.profiler = None  # or its destructor warns that it recorded nothing


def test_a_failure_in_a_probe_step_stops_the_profiler() -> None:
    def fail(prediction: Tensor, target: Tensor) -> Tensor:
        if learner.global_step == 9:
            raise RuntimeError("broken")
        return mse_loss(prediction, target)

    learner = MetaLearner(nn.Linear(1, 1), loss=fail, inner_lr=0.1)
    with pytest.raises(RuntimeError, match="broken"):
        train(learner, Lines(), ProbeSettings(speed=False, order_gap=False))
    # PyTorch allows one profiler per process: a second one cannot start while the first runs.
    assert memory(nn.Linear(1, 1), Lines(), mse_loss) > 0
