"""What `benchmark_engines.py` compares: other libraries and this project's engines."""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import Profiler
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.cli.fit_callbacks import fit_callbacks
from maml_pipeline.gradient_order import Method
from maml_pipeline.learner.checkpoints import LastCheckpoint
from maml_pipeline.learner.no_profiler import NoProfiler
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress_bar import MetaStepProgressBar
from maml_pipeline.learner.tracking import StartTracking
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, build_engine
from maml_pipeline.meta_gradient.inner_loop import trainable_parameters
from maml_pipeline.run_folder import RunSettings
from maml_pipeline.runs.results import ResultTable
from maml_pipeline.tasks import TaskBatch, TaskDistribution
from scripts import benchmark_peers as peers
from scripts.benchmark_jax import JaxMaml
from scripts.machine_limits import synchronize

BASELINE = "plain"
"""The contender that every other one is compared with: a plain learn2learn loop."""


@dataclass(frozen=True)
class Case:
    """One benchmark: tasks, network and inner loop.

    Args:
        name: Its heading in the report.
        tasks: Task distribution.
        network: Network with this project's layers.
        loss: Loss of both loops.
        inner: Inner learning rate, steps and method.
        meta_batch_size: Tasks per meta-step.
        log_every: Meta-steps between two logs, under the Trainer.
        steps_per_turn: Meta-steps that a contender takes in one turn.
        tasks_per_chunk: Tasks that the vectorized engine adapts at once; `None` for all.
        metric: Metric to log, under the Trainer.
    """

    name: str
    tasks: TaskDistribution
    network: nn.Module
    loss: Loss
    inner: InnerLoop
    meta_batch_size: int
    log_every: int
    steps_per_turn: int
    tasks_per_chunk: int | None = None
    metric: Loss | None = None

    @property
    def is_sine(self) -> bool:
        return self.name.startswith("sine")

    @property
    def order(self) -> str:
        return "first order" if self.inner.first_order else "second order"


@dataclass(frozen=True)
class Setting:
    """The device that a benchmark runs on, and the loggers of its trainings."""

    device: torch.device
    loggers: list[Logger]


TimeSteps = Callable[[int], list[float]]
"""Takes n meta-steps and returns the seconds that each took."""


@dataclass(frozen=True)
class Contender:
    """One implementation of a meta-step.

    Args:
        name: Its row in the table.
        build: Prepares it for a case; the result takes and times meta-steps.
        supports: Whether it can run a case.
    """

    name: str
    build: Callable[[Case, Setting], TimeSteps]
    supports: Callable[[Case], bool] = lambda case: True


def draw(case: Case, meta_step: int, device: torch.device) -> TaskBatch:
    """Draw the tasks of a meta-step."""
    first = meta_step * case.meta_batch_size
    batch = case.tasks.batch(0, "train", range(first, first + case.meta_batch_size))
    return batch.to(device)


def meta_step_flops(case: Case) -> int:
    """Count the FLOPs of the baseline's matrix products and convolutions in one meta-step.

    All contenders are charged the same count, so recomputation earns none of them credit.
    """
    network = peers.with_native_layers(case.network)
    counter = FlopCounterMode(display=False)
    with counter:
        peers.learn2learn_loop(network, case.loss, draw(case, 0, torch.device("cpu")), case.inner)
    return int(counter.get_total_flops())


def _bare(step: peers.MetaStep, case: Case, network: nn.Module, setting: Setting) -> TimeSteps:
    """Time meta-steps without Lightning: drawing tasks, meta-gradient and Adam step."""
    network = network.to(setting.device)
    _check(step, case, network, draw(case, 0, setting.device))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    taken = 0

    def take(steps: int) -> list[float]:
        nonlocal taken
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            taken += 1
            batch = draw(case, taken, setting.device)
            optimizer.zero_grad()
            step(network, case.loss, batch, case.inner)
            optimizer.step()
            synchronize(setting.device)
            seconds.append(time.perf_counter() - start)
        return seconds

    return take


def _check(step: peers.MetaStep, case: Case, network: nn.Module, batch: TaskBatch) -> None:
    """Exit unless a contender computes the learn2learn engine's meta-gradient in float64.

    Float32 is too coarse for this check: images have large areas of one value, which cross the kink
    of a ReLU together, so rounding alone can change the meta-gradient by a tenth.
    """
    batch = _in_float64(batch)
    network = copy.deepcopy(network).double()
    step(network, case.loss, batch, case.inner)
    actual = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    _compare(actual, _expected(case, network, batch), case)


def _in_float64(batch: TaskBatch) -> TaskBatch:
    return TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))


def _expected(case: Case, network: nn.Module, batch: TaskBatch) -> torch.Tensor:
    network = copy.deepcopy(network).double()
    gradient = Learn2LearnEngine().meta_gradient(network, case.loss, batch, case.inner).gradient
    return torch.cat([g.flatten() for g in gradient.values()])


def _compare(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    difference = ((actual - expected).norm() / expected.norm()).item()
    if not difference < 1e-8:
        sys.exit(f"{case.name}, {case.order}: a meta-gradient has a relative error of {difference:.2g}")


def _peer(step: peers.MetaStep) -> Callable[[Case, Setting], TimeSteps]:
    def build(case: Case, setting: Setting) -> TimeSteps:
        network = peers.with_native_layers(case.network)
        return _bare(step, case, network, setting)

    return build


def _jax(case: Case, setting: Setting) -> TimeSteps:
    assert isinstance(case.network, nn.Sequential)
    cpu = torch.device("cpu")
    maml = JaxMaml(case.network, case.inner, lambda meta_step: draw(case, meta_step, cpu))
    batch = draw(case, 0, cpu)
    _compare(maml.meta_gradient(batch), _expected(case, case.network, _in_float64(batch)), case)
    return maml.take


def _engine_settings(name: str, case: Case) -> dict[str, Any]:
    if name == "learn2learn":
        return {"engine": "learn2learn"}
    return {"engine": name, "tasks_per_chunk": case.tasks_per_chunk}


def _engine_step(engine: Engine) -> peers.MetaStep:
    def step(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        result = engine.meta_gradient(network, loss, batch, inner)
        for name, p in trainable_parameters(network).items():
            p.grad = result.gradient[name]

    return step


def _engine(name: str, checkpointed: bool = False) -> Callable[[Case, Setting], TimeSteps]:
    def build(case: Case, setting: Setting) -> TimeSteps:
        if checkpointed:
            case = replace(case, inner=case.inner.in_second_order(Method.CHECKPOINTED))
        step = _engine_step(build_engine(*_engine_settings(name, case).values()))
        return _bare(step, case, copy.deepcopy(case.network), setting)

    return build


def _engine_under_trainer(name: str) -> Callable[[Case, Setting], TimeSteps]:
    """Time meta-steps as in `maml fit`, with its callbacks, drawing tasks, logging and progress bar."""

    def build(case: Case, setting: Setting) -> TimeSteps:
        learner = MetaLearner(
            copy.deepcopy(case.network), loss=case.loss, inner_lr=case.inner.lr, metric=case.metric,
            inner_steps=case.inner.steps, first_order=case.inner.first_order,
            **_engine_settings(name, case),
        )  # fmt: skip
        data = TaskDataModule(case.tasks, case.meta_batch_size)
        return lambda steps: _fit_seconds(
            learner, steps, case, setting, _callbacks_of_fit, profiler=NoProfiler(), datamodule=data
        )

    return build


def _callbacks_of_fit(folder: Path) -> list[Callback]:
    """Return those of `maml fit`, except for the one that would start a W&B run for each turn."""
    run, probes = RunSettings(checkpoint_every=10**6), ProbeSettings(every=10**6)
    callbacks = fit_callbacks(folder, run, probes, 0, ResultTable(None), shows_progress=True)
    return [callback for callback in callbacks.ordered if not isinstance(callback, StartTracking)]


def _progress_and_checkpoint(folder: Path) -> list[Callback]:
    return [MetaStepProgressBar(), LastCheckpoint(folder / "last.ckpt", 10**6, StopOnSignal())]


def _lightning_maml(case: Case, setting: Setting) -> TimeSteps:
    network = peers.with_native_layers(case.network)
    module, loader = peers.lightning_maml(network, case.loss, case.inner)
    assert isinstance(module, LightningModule)
    batches = [draw(case, meta_step, torch.device("cpu")) for meta_step in range(4)]

    def take(steps: int) -> list[float]:
        return _fit_seconds(
            module, steps, case, setting, _progress_and_checkpoint,
            accumulate=case.meta_batch_size, train_dataloaders=loader(batches),
        )  # fmt: skip

    return take


class StepTimer(Callback):
    """Note when each meta-step ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []
        self.meta_step = 0

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Note the time if this batch completed a meta-step."""
        if trainer.global_step > self.meta_step:
            self.meta_step = trainer.global_step
            synchronize(self.device)
            self.ends.append(time.perf_counter())


def _fit_seconds(
    module: LightningModule,
    steps: int,
    case: Case,
    setting: Setting,
    callbacks: Callable[[Path], list[Callback]],
    accumulate: int = 1,
    profiler: Profiler | None = None,
    **data: Any,
) -> list[float]:
    """Train for a number of meta-steps and return the seconds of each.

    Of more than ten meta-steps, the first ten are not timed: they log their loss for the progress bar,
    and the tenth runs the probes.
    """
    before = 11 if steps > 10 else 1
    timer = StepTimer(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=setting.device.type, devices=1, max_steps=before + steps, max_epochs=-1,
            logger=setting.loggers, log_every_n_steps=case.log_every, limit_val_batches=0,
            enable_model_summary=False, accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
            default_root_dir=folder, callbacks=[timer, *callbacks(Path(folder))], profiler=profiler,
        )  # fmt: skip
        trainer.fit(module, **data)
    return [end - start for start, end in pairwise(timer.ends[before - 1 :])]


def _is_second_order(case: Case) -> bool:
    return not case.inner.first_order


CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender("learn2learn loop", _peer(peers.learn2learn_loop)),
    "higher": Contender("higher", _peer(peers.higher_loop)),
    "torchopt": Contender("TorchOpt", _peer(peers.torchopt_loop), _is_second_order),
    "lightning": Contender("learn2learn LightningMAML, Trainer", _lightning_maml, _is_second_order),
    "jax": Contender("JAX, jit + vmap + optax", _jax, lambda case: case.is_sine),
    "learn2learn": Contender("engine learn2learn", _engine("learn2learn")),
    "learn2learn-trainer": Contender(
        "engine learn2learn, Trainer", _engine_under_trainer("learn2learn")
    ),
    "vectorized": Contender("engine vectorized", _engine("vectorized")),
    "vectorized-trainer": Contender("engine vectorized, Trainer", _engine_under_trainer("vectorized")),
    "native": Contender("engine native", _engine("native")),
    "native-trainer": Contender("engine native, Trainer", _engine_under_trainer("native")),
    "checkpointed": Contender(
        "engine native, checkpointed", _engine("native", checkpointed=True), _is_second_order
    ),
}
"""The choices of `--contenders`."""
