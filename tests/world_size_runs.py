"""Trainings that every rank runs for `tests/test_world_size.py`."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from maml_pipeline import MetaLearner, Task, TaskDataModule, TaskDistribution
from maml_pipeline.errors import UserError
from maml_pipeline.learner import LearnedInnerLr, accuracy
from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint
from maml_pipeline.learner.metrics_csv import MetricsCSV
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings, order_gap
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import SineWaves, Split, random_generator
from tests.helpers import make_trainer
from tests.ranks import WORLD_SIZE_VARIABLE

META_STEPS = 20
META_BATCH = 8
BALLAST = 10**8
EVALUATED = (1, 2, 5, 8, 13)  # test tasks: fewer than ranks, not divisible, one batch, more than one

ENGINES: dict[str, dict[str, Any]] = {
    "learn2learn": {"engine": "learn2learn"},
    "learn2learn checkpointed": {"engine": "learn2learn", "method": "checkpointed"},
    "vectorized": {"engine": "vectorized"},
    "vectorized in chunks": {"engine": "vectorized", "tasks_per_chunk": 3},
    "vectorized checkpointed": {"engine": "vectorized", "method": "checkpointed"},
}
SLOW_ON_IMAGES = ("learn2learn checkpointed", "vectorized in chunks")


class RandomImages(TaskDistribution):
    """Tell three random images of 8 x 8 pixels apart, each seen through noise."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        random = random_generator(seed, split, index)
        images = random.random((1, 3, 1, 8, 8)) + 0.3 * random.random((4, 3, 1, 8, 8))
        x, y = torch.from_numpy(images).float(), torch.arange(3).repeat(2)
        return Task(x[:2].flatten(0, 1), y, x[2:].flatten(0, 1), y)


class Partly(nn.Module):
    """A network with a frozen layer, an unused parameter, and one with zero gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(hidden_features=[8])
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.without_effect = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.frozen(x) + 0 * self.without_effect.sum()
        return y


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@dataclass
class Case:
    """One short training."""

    learner: dict[str, Any]
    network: Callable[[], nn.Module] = lambda: MLP(hidden_features=[8, 8])
    trainer: dict[str, Any] = field(default_factory=dict)
    meta_batch_size: int = META_BATCH
    images: bool = False


class Trained(NamedTuple):
    """What a training produced.

    Args:
        gradient: The first meta-gradient, before clipping.
        weights: The final weights.
        reductions: The number of gradient reductions in the backward pass of each batch.
    """

    gradient: dict[str, Tensor]
    weights: dict[str, Tensor]
    reductions: list[int]


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case, named by its engine, gradient order and way of training."""
    accumulated, clipped = {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}
    descent = {"optimizer": sgd}  # under Adam, clipping would not change much
    for engine, settings in ENGINES.items():
        for order, first_order in (("first order", True), ("second order", False)):
            learner = {"first_order": first_order, **settings}
            if first_order:
                learner.pop("method", None)  # only second order has one
            yield f"{engine}, {order}", Case(learner)
            both = Case(learner | descent, trainer=accumulated | clipped, meta_batch_size=4)
            yield f"{engine}, {order}, accumulated and clipped", both
            if engine not in SLOW_ON_IMAGES:
                yield f"{engine}, {order}, images", Case(learner, small_convnet, images=True)
        yield f"{engine}, annealed", Case({"first_order_meta_steps": 15, **settings})
        yield f"{engine}, partly", Case(settings, Partly)
        learned = {"learned_inner_lr": LearnedInnerLr(0.01), "adapt": ["2.*", "4.*"], "inner_steps": 3}
        yield f"{engine}, learned rates", Case(settings | learned)
    settings = {"engine": "vectorized", "inner_steps": 1, **descent}
    yield "one inner step", Case(settings)
    yield "one inner step, accumulated", Case(settings, trainer=accumulated, meta_batch_size=4)
    yield "one inner step, clipped", Case(settings, trainer=clipped)


def small_convnet() -> nn.Module:
    return ConvNet(ways=3, filters=3)


def train_and_evaluate(folder: Path) -> dict[str, Any]:
    """Train every case, evaluate, and train once as `maml fit` does."""
    results: dict[str, Any] = {name: train(case) for name, case in cases()}
    for engine in ("learn2learn", "vectorized"):
        results |= {f"{engine}, evaluation of {n}": evaluate(engine, n) for n in EVALUATED}
    whole_run(folder)
    results["one rank out of memory"] = one_rank_out_of_memory()
    results["refused"] = refused()
    return results


def train(case: Case) -> Trained:
    """Train for a few meta-steps."""
    learner, recorder = build(case), Recorder()
    tasks = RandomImages() if case.images else SineWaves(shots=5)
    trainer(callbacks=[recorder], **case.trainer).fit(
        learner, datamodule=TaskDataModule(tasks, case.meta_batch_size)
    )
    weights = learner.network.state_dict() | rates_of(learner)
    return Trained(recorder.gradient, weights, recorder.reductions)


def rates_of(learner: MetaLearner) -> dict[str, Tensor]:
    """Return the learned inner learning rates, if there are any."""
    return {} if learner.inner_rates is None else {"inner_rates": learner.inner_rates}


def build(case: Case) -> MetaLearner:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"inner_steps": 2, "loss": mse_loss, "inner_lr": 0.02}
    if case.images:
        # The gradient of a bias before a normalisation is rounding error, which Adam magnifies.
        settings |= {"loss": cross_entropy, "inner_lr": 0.3, "metric": accuracy, "optimizer": sgd}
    return MetaLearner(case.network(), **(settings | case.learner))


def trainer(**settings: Any) -> Trainer:
    """Build a float64 trainer for all ranks, with Lightning's DDP if there are several."""
    world_size = int(os.environ[WORLD_SIZE_VARIABLE])
    ranks = {"devices": world_size, "strategy": "ddp" if world_size > 1 else "auto"}
    return make_trainer(**({"precision": "64-true", "max_steps": META_STEPS} | ranks | settings))


class Recorder(Callback):
    """Records the first meta-gradient, and counts DDP's gradient reductions in each backward pass."""

    def __init__(self) -> None:
        self.reductions: list[int] = []

    def on_train_start(self, trainer: Trainer, learner: Any) -> None:
        """Count reductions if there are several ranks."""
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(self, Recorder.reduce)

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Reduce a bucket of gradients as DDP does by default."""
        self.reductions[-1] += 1
        group: Any = dist.group.WORLD
        return allreduce_hook(group, bucket)

    def on_before_backward(self, *args: Any) -> None:
        """Start the count of this batch."""
        self.reductions.append(0)

    def on_before_optimizer_step(self, trainer: Trainer, learner: Any, *args: Any) -> None:
        """Store the gradient before clipping."""
        if trainer.global_step == 0:
            named = dict(learner.network.named_parameters()) | rates_of(learner)
            self.gradient = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def evaluate(engine: str, tasks: int) -> tuple[dict[str, Tensor], list[float]]:
    """Test an untrained network; return the metrics, and this rank's tasks by their first input."""
    learner, seen = build(Case({"engine": engine, "eval_inner_steps": 3})), Seen()
    data = TaskDataModule(SineWaves(shots=5), META_BATCH, test_tasks=tasks)
    lightning = trainer(callbacks=[seen])
    lightning.test(learner, datamodule=data, verbose=False)
    return dict(lightning.callback_metrics), seen.tasks


class Seen(Callback):
    """Records the first support input of every task that this rank evaluates."""

    def __init__(self) -> None:
        self.tasks: list[float] = []

    def on_test_batch_start(self, trainer: Trainer, learner: Any, batch: Any, *args: Any) -> None:
        """Store the batch's tasks."""
        self.tasks += batch.support_x[:, 0, 0].tolist()


def whole_run(folder: Path) -> None:
    """Train with all loggers and callbacks of `maml fit`, validating fewer tasks than ranks."""
    probes, checkpoints = ProbeSettings(every=5).callbacks(), folder / "run" / "checkpoints"
    lightning = trainer(
        logger=MetricsCSV(folder / "run" / "metrics.csv"),
        callbacks=[
            Ballast(),
            *probes,
            BestCheckpoint(checkpoints / "best.ckpt", "val/loss", "min"),
            LastCheckpoint(checkpoints / "last.ckpt", 5, StopOnSignal()),
        ],
        enable_checkpointing=True,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        log_every_n_steps=4,
    )
    learner = build(Case({"engine": "vectorized"}))
    lightning.fit(learner, datamodule=TaskDataModule(SineWaves(shots=5), META_BATCH, val_tasks=3))


class Ballast(Callback):
    """Raises the peak memory of each rank by `BALLAST` bytes more than that of the previous one."""

    def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
        """Allocate and free the ballast."""
        torch.empty(BALLAST * (trainer.global_rank + 1), dtype=torch.uint8)


def one_rank_out_of_memory() -> int:
    """Return the number of meta-steps of a run whose last rank has no memory to compare the orders."""

    def out_of_memory(learner: MetaLearner, batch: Any) -> Any:
        if learner.global_rank == learner.trainer.world_size - 1:
            raise torch.OutOfMemoryError("out of memory")
        return both_orders(learner, batch)

    both_orders = order_gap.both_orders
    lightning = trainer(callbacks=[order_gap.OrderGapProbe(every=5)])
    with mock.patch.object(order_gap, "both_orders", out_of_memory):
        lightning.fit(build(Case({})), datamodule=TaskDataModule(SineWaves(shots=5), META_BATCH))
    return lightning.global_step


def refused() -> str:
    """Return the error for a meta-batch of 6 tasks on these ranks, or an empty text."""
    try:
        trainer(max_steps=1).fit(build(Case({})), datamodule=TaskDataModule(SineWaves(shots=5), 6))
    except UserError as error:
        return str(error)
    return ""
