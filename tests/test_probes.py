"""Probes measure meta-steps exactly and never change training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.learner.probes import MemoryProbe, OrderGapProbe, ProbeSettings, SpeedProbe
from maml_pipeline.meta_gradient.checkpointed import longest_segment
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Lines, SineWaves, Task, TaskDistribution
from maml_pipeline.tasks.task import Split
from tests.helpers import make_trainer, network_weights

ENGINES = ["learn2learn", "vectorized"]
ORDERS: dict[str, dict[str, Any]] = {
    "first": {"first_order": True},
    "second": {},
    "checkpointed": {"checkpoint_inner_steps": True},
}
FLOAT = 4

Figures = dict[int, dict[str, float]]
"""Logged metrics by meta-step, counted from 0."""


class MetricsInMemory(DummyLogger):
    """Stores all metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: Figures = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.figures.setdefault(step, {}).update(metrics)


class RandomImages(TaskDistribution):
    """Tasks with three classes and one image per class in each set."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        x = torch.rand(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(index))
        return Task(x[0], torch.arange(3), x[1], torch.arange(3))


def train(
    learner: MetaLearner,
    tasks: TaskDistribution,
    settings: ProbeSettings,
    steps: int = 10,
    meta_batch_size: int = 1,
    **trainer_settings: Any,
) -> Figures:
    """Train and return the metrics that the probes logged, by meta-step."""
    logger = MetricsInMemory()
    lightning: Trainer = make_trainer(
        max_steps=steps,
        logger=logger,
        callbacks=settings.callbacks(),
        limit_val_batches=0,
        **trainer_settings,
    )
    lightning.fit(learner, datamodule=TaskDataModule(tasks, meta_batch_size))
    probed = ("memory/", "speed/", "order_gap/")
    return {
        step: found
        for step, metrics in logger.figures.items()
        if (found := {name: value for name, value in metrics.items() if name.startswith(probed)})
    }


def memory(
    network: nn.Module, tasks: TaskDistribution, loss: Any = cross_entropy, **settings: Any
) -> int:
    """Return the peak memory of the tenth meta-step in bytes."""
    learner = MetaLearner(network, loss=loss, inner_lr=0.01, **settings)
    figures = train(learner, tasks, ProbeSettings(speed=False, order_gap=False))
    return int(figures[9]["memory/meta_step_peak_bytes"])


# Schedule --------------------------------------------------------------------------------------


def test_probes_run_at_meta_step_10_and_every_multiple_of_every() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(learner, Lines(), ProbeSettings(every=12), steps=40)
    assert [step + 1 for step in figures] == [10, 12, 24, 36]
    names = [{name.split("/")[0] for name in found} for found in figures.values()]
    assert all(found == {"memory", "speed", "order_gap"} for found in names)


@pytest.mark.parametrize("probe", ["memory", "speed", "order_gap"])
def test_each_probe_can_be_disabled(probe: str) -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(learner, Lines(), ProbeSettings(**{probe: False}))
    assert {name.split("/")[0] for name in figures[9]} == {"memory", "speed", "order_gap"} - {probe}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ORDERS)
def test_probes_never_change_the_weights(order: str, engine: Any, accumulate: int) -> None:
    def trained(settings: ProbeSettings) -> Tensor:
        torch.manual_seed(0)
        learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, engine=engine, **ORDERS[order])
        train(
            *(learner, SineWaves(), settings),
            steps=16,
            meta_batch_size=3,
            accumulate_grad_batches=accumulate,
        )
        return network_weights(learner)

    nothing = ProbeSettings(memory=False, speed=False, order_gap=False)
    assert torch.equal(trained(ProbeSettings(every=5)), trained(nothing))


def test_probes_never_change_random_numbers() -> None:
    def trained(settings: ProbeSettings) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(
            *(
                nn.Linear(1, 8),
                nn.BatchNorm1d(8, track_running_stats=False),
                nn.Dropout(0.5),
                nn.Tanh(),
                nn.Linear(8, 1),
            )
        )
        learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01)
        train(learner, SineWaves(), settings, steps=12)
        return [*network.state_dict().values()]

    # All probes at every meta-step, compared with probes that run once.
    states = trained(ProbeSettings(every=1)), trained(ProbeSettings(every=10**6, order_gap=False))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_settings_out_of_range_are_rejected() -> None:
    with pytest.raises(UserError, match=r"probes\.every is 0; it must be 1 or more"):
        ProbeSettings(every=0)


# Memory ----------------------------------------------------------------------------------------


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
        settings = {"inner_steps": steps, "engine": engine, "checkpoint_inner_steps": True}
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


# Speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_first_order_flops_match_a_count_by_hand(engine: Any) -> None:
    """A layer with n inputs and m outputs takes 2nm forward, 2nm for its weights, 2nm for its inputs.

    The first layer needs no gradient for its inputs.
    """
    widths, shots, tasks, steps = (1, 40, 40, 1), 10, 3, 2
    products = [n * m for n, m in pairwise(widths)]
    forward_and_backward = 2 * shots * (3 * sum(products) - products[0])
    settings = {"inner_steps": steps, "engine": engine, "first_order": True}
    learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, **settings)
    figures = train(
        *(learner, SineWaves(shots=shots), ProbeSettings(memory=False, order_gap=False)),
        meta_batch_size=tasks,
    )[9]
    assert figures["speed/meta_step_flops"] == tasks * (steps + 1) * forward_and_backward


def test_second_order_takes_more_flops_and_checkpointing_more_again() -> None:
    def flops(order: str) -> float:
        settings = {"inner_steps": 3, "engine": "vectorized", **ORDERS[order]}
        learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, **settings)
        return train(learner, SineWaves(), ProbeSettings(memory=False, order_gap=False))[9][
            "speed/meta_step_flops"
        ]

    assert flops("first") < flops("second") < flops("checkpointed")


def test_rates_follow_from_the_time_of_a_meta_step() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(
        *(learner, Lines(), ProbeSettings(memory=False, order_gap=False)),
        meta_batch_size=5,
        accumulate_grad_batches=2,
    )[9]
    seconds = figures["speed/meta_step_ms"] / 1e3
    assert seconds > 0
    assert figures["speed/tasks_per_second"] == pytest.approx(5 * 2 / seconds)
    flops = figures["speed/meta_step_flops"]
    assert figures["speed/flops_per_second"] == pytest.approx(flops / seconds)


# Order gap -------------------------------------------------------------------------------------


def test_the_order_gap_equals_the_closed_form() -> None:
    """Compare the gap of the tenth meta-step in float64."""
    before: dict[int, Tensor] = {}

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            before.setdefault(learner.global_step, nn.utils.parameters_to_vector(self.parameters()))
            before[learner.global_step] = before[learner.global_step].detach().clone()
            return super().forward(x)

    class DoubleLines(Lines):
        def task(self, seed: int, split: Split, index: int) -> Task:
            return Task(*(tensor.double() for tensor in super().task(seed, split, index)))

    learner = MetaLearner(Linear(1, 1).double(), loss=mse_loss, inner_lr=0.1, inner_steps=3)
    figures = train(
        *(learner, DoubleLines(), ProbeSettings(memory=False, speed=False)), meta_batch_size=4
    )[9]
    gradients = [
        torch.stack(
            [
                linear_meta_gradient(before[9], DoubleLines().task(0, "train", i), inner)
                for i in range(9 * 4, 10 * 4)
            ]
        ).mean(dim=0)
        for inner in (replace(learner.inner, first_order=order) for order in (True, False))
    ]
    first, second = gradients
    norms = first.norm() * second.norm()
    assert figures["order_gap/cosine"] == pytest.approx((first @ second / norms).item(), rel=1e-12)
    assert figures["order_gap/norm_ratio"] == pytest.approx(
        (first.norm() / second.norm()).item(), rel=1e-12
    )
    error = (first - second).norm() / second.norm()
    assert figures["order_gap/relative_error"] == pytest.approx(error.item(), rel=1e-11)
    assert error > 0.01


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ORDERS)
def test_without_inner_steps_there_is_no_gap(order: str, engine: Any) -> None:
    learner = MetaLearner(
        MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=0, engine=engine, **ORDERS[order]
    )
    figures = train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]
    overall = {name.removeprefix("order_gap/"): value for name, value in figures.items()}
    assert overall["cosine"] == pytest.approx(1, abs=1e-12)
    assert overall["norm_ratio"] == 1 and overall["relative_error"] == 0


def test_each_layer_has_its_own_cosine() -> None:
    learner = MetaLearner(
        nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), loss=mse_loss, inner_lr=0.05
    )
    figures = train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]
    cosines = {name for name in figures if name.startswith("order_gap/cosine")}
    assert cosines == {"order_gap/cosine", "order_gap/cosine/0", "order_gap/cosine/2"}


def test_the_order_gap_does_not_depend_on_the_training_method() -> None:
    def gap(order: str) -> dict[str, float]:
        torch.manual_seed(0)
        learner = MetaLearner(
            MLP(), loss=mse_loss, inner_lr=0.01, optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
            **ORDERS[order],
        )  # fmt: skip
        return train(learner, SineWaves(), ProbeSettings(memory=False, speed=False))[9]

    assert gap("first") == gap("second") == gap("checkpointed")


def test_a_first_order_run_continues_where_second_order_is_unavailable(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(1, 4)), nn.Linear(4, 1))
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01, first_order=True)
    figures = train(learner, SineWaves(), ProbeSettings(every=5), steps=20)
    assert not any(name.startswith("order_gap") for found in figures.values() for name in found)
    (record,) = [r for r in caplog.records if "order_gap is not measured" in r.getMessage()]
    assert "weight" in record.getMessage()


@pytest.mark.parametrize("probe", [MemoryProbe, SpeedProbe, OrderGapProbe])
def test_a_probe_works_with_any_trainer(probe: Any) -> None:
    logger = MetricsInMemory()
    lightning = make_trainer(
        max_steps=10, logger=logger, callbacks=[probe(every=10)], limit_val_batches=0
    )
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    lightning.fit(learner, datamodule=TaskDataModule(Lines(), 2))
    assert any("/" in name and not name.startswith("train") for name in logger.figures[9])


# Resumed runs ----------------------------------------------------------------------------------


class SaveAt(Callback):
    """Saves a checkpoint after each of the given meta-steps."""

    def __init__(self, folder: Path, meta_steps: Sequence[int]) -> None:
        self.folder = folder
        self.meta_steps = meta_steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step in self.meta_steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", [lambda: nn.Linear(1, 1), MLP])
def test_a_resumed_run_logs_the_same_probes_as_an_uninterrupted_one(
    tmp_path: Path, network: Any, engine: Any, order: str
) -> None:
    starts = range(5, 13)  # before, at and after the probe steps 6, 10 and 12

    def run(callbacks: Sequence[Callback], start: int | None = None) -> tuple[Figures, list[Tensor]]:
        torch.manual_seed(0)
        logger = MetricsInMemory()
        lightning = make_trainer(
            max_steps=18,
            logger=logger,
            limit_val_batches=0,
            callbacks=[*ProbeSettings(every=6).callbacks(), *callbacks],
        )
        learner = MetaLearner(network(), loss=mse_loss, inner_lr=0.01, engine=engine, **ORDERS[order])
        lightning.fit(
            learner,
            datamodule=TaskDataModule(SineWaves(), 3),
            ckpt_path=None if start is None else tmp_path / f"{start}.ckpt",
            weights_only=True,
        )
        return logger.figures, [p.detach().clone() for p in learner.parameters()]

    whole, trained = run([SaveAt(tmp_path, starts)])
    assert [step for step in whole if "order_gap/cosine" in whole[step]] == [5, 9, 11, 17]
    for start in starts:
        figures, weights = run([], start)
        assert all(map(torch.equal, weights, trained))
        for step in range(start, 18):
            assert _without_time(figures, step) == _without_time(whole, step)


def _without_time(figures: Figures, step: int) -> dict[str, float]:
    timed = ("speed/meta_step_ms", "speed/tasks_per_second", "speed/flops_per_second")
    probed = ("memory/", "speed/", "order_gap/")
    return {
        name: 0.0 if name in timed else value
        for name, value in figures.get(step, {}).items()
        if name.startswith(probed)
    }
