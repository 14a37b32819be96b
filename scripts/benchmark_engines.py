"""How fast every way to take a meta-step is: peers, engines, bare and under the Trainer.

    python -m scripts.benchmark_engines --out benchmark     # needs the dependency group "peers"

Every round runs a few meta-steps of each way, one after another, so that all meet the same noise of
the machine; figures are medians over the rounds' meta-steps, outer Adam step included. Peers and the
plain loop train the network with PyTorch's own batch normalisation, which is the fastest for them.
Before anything is timed, each way's meta-gradient is held against the learn2learn engine's, but for the
compiled ones'.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.learner import accuracy
from maml_pipeline.learner.checkpoints import LastCheckpoint
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.progress import MetaStepProgressBar
from maml_pipeline.learner.tracking import finish_tracking, run_loggers
from maml_pipeline.meta_gradient import Engine, InnerLoop, Learn2LearnEngine, Loss, build_engine
from maml_pipeline.meta_gradient.inner_loop import trainable_parameters
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d
from maml_pipeline.tasks import Omniglot, SineWaves, TaskBatch, TaskDistribution
from scripts import benchmark_peers as peers

PLAIN = "learn2learn loop"


@dataclass(frozen=True)
class Case:
    """One benchmark: tasks, network and inner loop."""

    name: str
    tasks: TaskDistribution
    network: nn.Module
    loss: Loss
    inner: InnerLoop
    meta_batch_size: int
    log_every: int
    tasks_per_chunk: int | None = None
    metric: Loss | None = None


def cases(omniglot: bool) -> Iterator[Case]:
    """Yield the benchmarks, in second order."""
    for steps in (1, 5):
        name = f"sine, 25 tasks, k = {steps}"
        yield Case(name, SineWaves(shots=10), MLP(), mse_loss, InnerLoop(0.01, steps), 25, 100)
    if omniglot:
        for ways, tasks, inner, chunk in (
            (5, 32, InnerLoop(0.4, 1), None),
            (20, 16, InnerLoop(0.1, 5), 8),
        ):
            name = f"Omniglot {ways}-way 1-shot, {tasks} tasks, k = {inner.steps}"
            distribution, network = Omniglot(ways, shots=1), ConvNet(ways)
            yield Case(
                name, distribution, network, cross_entropy, inner, tasks, 25, chunk, metric=accuracy
            )


def with_native_norm(network: nn.Module) -> nn.Module:
    """Copy a network, with PyTorch's batch normalisation in the place of this project's."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchStatisticsNorm2d):
                norm = nn.BatchNorm2d(len(child.weight), child.eps, track_running_stats=False)
                setattr(module, name, norm)
    return network


@dataclass
class Way:
    """One way to take meta-steps: `take(n)` takes n and returns the seconds of each."""

    name: str
    take: Callable[[int], list[float]]


def bare(name: str, case: Case, step: peers.MetaStep, native: bool, device: torch.device) -> Way:
    """Time meta-steps without Lightning: tasks drawn, meta-gradient, and Adam."""
    network = (with_native_norm(case.network) if native else copy.deepcopy(case.network)).to(device)
    if "compiled" not in name:  # that takes minutes, and tests/test_compilation.py does it
        check(name, case, step, network, draw(case, 0, device))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=not native)
    taken = 0

    def take(steps: int) -> list[float]:
        nonlocal taken
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            taken += 1
            batch = draw(case, taken, device)
            optimizer.zero_grad()
            step(network, case.loss, batch, case.inner)
            optimizer.step()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        return seconds

    return Way(name, take)


def draw(case: Case, meta_step: int, device: torch.device) -> TaskBatch:
    first = meta_step * case.meta_batch_size
    batch = case.tasks.batch(0, "train", range(first, first + case.meta_batch_size))
    return TaskBatch(*(tensor.to(device) for tensor in batch))


def check(name: str, case: Case, step: peers.MetaStep, network: nn.Module, batch: TaskBatch) -> None:
    """Refuse to time what does not compute the meta-gradient, in float64.

    In float32 the ways cannot be told apart: images have large areas of one value, which cross the
    kink of a ReLU together, so that rounding alone can change the meta-gradient by a tenth.
    """
    network = copy.deepcopy(network).double()
    x, y = batch.support_x.double(), batch.query_x.double()
    targets = [t.double() if t.is_floating_point() else t for t in (batch.support_y, batch.query_y)]
    batch = TaskBatch(x, targets[0], y, targets[1])
    expected = Learn2LearnEngine().meta_gradient(network, case.loss, batch, case.inner).gradient
    step(network, case.loss, batch, case.inner)
    actual = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    reference = torch.cat([g.flatten() for g in expected.values()])
    difference = ((actual - reference).norm() / reference.norm()).item()
    if not difference < 1e-8:
        sys.exit(f"{case.name}: the meta-gradient of {name} is off by {difference:.2g}")


def engine_step(engine: Engine) -> peers.MetaStep:
    def step(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        result = engine.meta_gradient(network, loss, batch, inner)
        for name, p in trainable_parameters(network).items():
            p.grad = result.gradient[name]

    return step


class StepTimer(Callback):
    """Note when each meta-step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []
        self.meta_step = 0

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Note the time where the batch ended a meta-step."""
        if trainer.global_step > self.meta_step:
            self.meta_step = trainer.global_step
            synchronize(self.device)
            self.ends.append(time.perf_counter())


def under_trainer(
    name: str, case: Case, loggers: list[Logger], device: torch.device, **settings: Any
) -> Way:
    """Time meta-steps with everything that `maml fit` does in each: drawing, logging, the bar."""
    learner = MetaLearner(
        copy.deepcopy(case.network), loss=case.loss, inner_lr=case.inner.lr, metric=case.metric,
        inner_steps=case.inner.steps, first_order=case.inner.first_order, **settings,
    )  # fmt: skip
    data = TaskDataModule(case.tasks, case.meta_batch_size)
    return Way(name, lambda steps: fit_seconds(learner, steps, case, loggers, device, datamodule=data))


def lightning_maml(name: str, case: Case, loggers: list[Logger], device: torch.device) -> Way:
    module, loader = peers.lightning_maml(with_native_norm(case.network), case.loss, case.inner)
    assert isinstance(module, LightningModule)
    batches = [draw(case, meta_step, torch.device("cpu")) for meta_step in range(4)]

    def take(steps: int) -> list[float]:
        return fit_seconds(
            module, steps, case, loggers, device, train_dataloaders=loader(batches),
            accumulate=case.meta_batch_size,
        )  # fmt: skip

    return Way(name, take)


def fit_seconds(
    module: LightningModule,
    steps: int,
    case: Case,
    loggers: list[Logger],
    device: torch.device,
    accumulate: int = 1,
    **data: Any,
) -> list[float]:
    """Train for some meta-steps, and return the time between the ends of each two.

    Many short ones are measured after the first ten, which are logged for the progress bar.
    """
    before = 11 if steps > 10 else 1
    timer = StepTimer(device)
    with tempfile.TemporaryDirectory() as folder:
        last = LastCheckpoint(Path(folder), 10**6, StopOnSignal())
        trainer = Trainer(
            accelerator=device.type, devices=1, max_steps=before + steps, max_epochs=-1, logger=loggers,
            log_every_n_steps=case.log_every, limit_val_batches=0, enable_model_summary=False,
            accumulate_grad_batches=accumulate, num_sanity_val_steps=0, default_root_dir=folder,
            callbacks=[timer, MetaStepProgressBar(), last],
        )  # fmt: skip
        trainer.fit(module, **data)
    return [end - start for start, end in pairwise(timer.ends[before - 1 :])]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ways(case: Case, loggers: list[Logger], device: torch.device, compiled: bool) -> Iterator[Way]:
    """Yield every way that can run the case, the plain loop first."""
    yield bare(PLAIN, case, peers.learn2learn_loop, True, device)
    yield bare("higher", case, peers.higher_loop, True, device)
    if not case.inner.first_order:
        yield bare("TorchOpt", case, peers.torchopt_loop, True, device)
        yield lightning_maml("learn2learn LightningMAML, Trainer", case, loggers, device)
    engines: dict[str, dict[str, Any]] = {
        "engine learn2learn": {"engine": "learn2learn"},
        "engine vectorized": {"engine": "vectorized", "tasks_per_chunk": case.tasks_per_chunk},
    }
    if compiled:
        engines["engine vectorized, compiled"] = engines["engine vectorized"] | {"compile": True}
    for name, settings in engines.items():
        built = build_engine(*settings.values())
        yield bare(name, case, engine_step(built), False, device)
        yield under_trainer(f"{name}, Trainer", case, loggers, device, **settings)
    if not case.inner.first_order:
        checkpointed = replace(case, inner=replace(case.inner, checkpointed=True))
        built = build_engine("vectorized", case.tasks_per_chunk)
        yield bare("engine vectorized, checkpointed", checkpointed, engine_step(built), False, device)


def measure(case: Case, arguments: argparse.Namespace, loggers: list[Logger]) -> dict[str, float]:
    """Return the median milliseconds of a meta-step of every way."""
    device = torch.device(arguments.device)
    table = list(ways(case, loggers, device, arguments.compile))
    for way in table:
        way.take(2)  # warm up
    per_round = 20 if case.name.startswith("sine") else 2
    seconds: dict[str, list[float]] = {way.name: [] for way in table}
    for done in range(arguments.rounds):
        for way in table:
            seconds[way.name] += way.take(per_round)
        print(
            f"{case.name}, {order(case)}: round {done + 1} of {arguments.rounds}",
            file=sys.stderr,
            flush=True,
        )
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def order(case: Case) -> str:
    return "first order" if case.inner.first_order else "second order"


def markdown(results: list[dict[str, Any]]) -> str:
    """Write one table a case: a row for each way, milliseconds and the ratio to the plain loop."""
    lines: list[str] = []
    for name in dict.fromkeys(result["case"] for result in results):
        orders = {result["order"]: result["ms"] for result in results if result["case"] == name}
        lines += [
            f"**{name}**",
            "",
            "| a meta-step of | " + " | ".join(f"{o} | ratio" for o in orders) + " |",
        ]
        lines += ["|---" + "|---:|---:" * len(orders) + "|"]
        for way in dict.fromkeys(way for ms in orders.values() for way in ms):
            cells = [
                f"{ms[way]:.2f} ms | {ms[PLAIN] / ms[way]:.2f}" if way in ms else "- | -"
                for ms in orders.values()
            ]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    configure_logging()
    peers.quiet()

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "python": platform.python_version(),
        "versions": {
            package: version(package)
            for package in ("torch", "pytorch-lightning", "learn2learn", "higher", "torchopt", "wandb")
        },
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        loggers = run_loggers(Path(folder), {})
        for case in cases(omniglot=not arguments.case.startswith("sine")):
            if not case.name.startswith(arguments.case):
                continue
            for first_order in (True, False):
                ordered = replace(case, inner=replace(case.inner, first_order=first_order))
                ms = measure(ordered, arguments, loggers)
                report["results"].append({"case": case.name, "order": order(ordered), "ms": ms})
                arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
                arguments.out.with_suffix(".md").write_text(markdown(report["results"]))
        finish_tracking()
    print(markdown(report["results"]))


if __name__ == "__main__":
    main()
