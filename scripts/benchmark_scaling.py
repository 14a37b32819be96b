"""Measure how meta-training scales over processes: tasks per second and time spent communicating.

    python -m scripts.benchmark_scaling                    # 1 and 2 CPU processes of one thread each
    python -m scripts.benchmark_scaling --device cuda      # 1 to all GPUs, if they divide the tasks

What is measured: training through Lightning's Trainer as in `maml fit`, without validation and logging;
several processes use DDP. Strong scaling divides one meta-batch among the processes; weak scaling gives
each process a meta-batch. In each round every configuration runs once, so that all see the same noise
of the machine.

How to read the table: values are medians over rounds of the median meta-step. "Speed-up" is tasks per
second divided by that of one process in the same round. "Communication" is the share of a meta-step
that rank 0 spends in DDP's all-reduce, including the wait for the slowest rank. Nothing overlaps with
it, because the meta-gradient arrives as a whole. It is timed in a communication hook, by the clock on
the CPU and by stream events on CUDA, and excludes Lightning's broadcast of the stop flag before every
batch.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning import Callback, Trainer
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel

from maml_pipeline import MetaLearner, TaskDataModule, TaskDistribution
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Omniglot, SineWaves

WARM_UP = 12  # meta-steps before timing; the first ten log their loss for the progress bar


@dataclass
class Run:
    """One training: its case, number of processes and meta-batch size."""

    case: str
    scaling: str
    processes: int
    meta_batch_size: int
    steps: int
    arguments: argparse.Namespace


def build(case: str, arguments: argparse.Namespace) -> tuple[MetaLearner, TaskDistribution]:
    """Build the second-order learner and the tasks of a case."""
    settings: dict[str, Any] = {"engine": "vectorized"}
    if case == "sine":
        learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=5, **settings)
        return learner, SineWaves(shots=10)
    learner = MetaLearner(ConvNet(ways=5), loss=cross_entropy, inner_lr=0.4, inner_steps=1, **settings)
    return learner, Omniglot(ways=5, shots=1)


class Clock(Callback):
    """Time every meta-step and the all-reduce in it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.reductions: list[tuple[Any, Any]] = []

    def on_train_start(self, trainer: Trainer, learner: Any) -> None:
        """Register the timed all-reduce with DDP."""
        self.on_cuda = learner.device.type == "cuda"
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(None, self.reduce)

    def reduce(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket over all ranks, as DDP does by default."""
        gradient = bucket.buffer().div_(torch.distributed.get_world_size())
        start = self.now()
        torch.distributed.all_reduce(gradient)
        self.reductions.append((start, self.now()))
        devices: list[Any] = [gradient.device] if self.on_cuda else []
        averaged: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        averaged.set_result(gradient)
        return averaged

    def now(self) -> Any:
        """Return a stream event on CUDA, the time in seconds elsewhere."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time, and discard the warm-up when it ends."""
        if self.on_cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM_UP:
            self.ends, self.reductions = self.ends[-1:], []

    def summary(self) -> tuple[float, float]:
        """Return the median meta-step in seconds, and the share of time spent communicating."""
        seconds = [end - start for start, end in pairwise(self.ends)]
        waits = [s.elapsed_time(e) / 1e3 if self.on_cuda else e - s for s, e in self.reductions]
        return statistics.median(seconds), sum(waits) / sum(seconds)


def train(run: Run, rank: int, port: int, result: Connection) -> None:
    """Train as one rank of a run; rank 0 sends the measurements."""
    if run.processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(run.arguments.threads)
    torch.manual_seed(0)
    configure_logging()
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
    learner, tasks = build(run.case, run.arguments)
    clock = Clock()
    Trainer(
        accelerator=run.arguments.device, devices=run.processes, max_epochs=-1, logger=False,
        strategy="ddp" if run.processes > 1 else "auto", max_steps=WARM_UP + run.steps,
        callbacks=[clock], limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    ).fit(learner, datamodule=TaskDataModule(tasks, run.meta_batch_size))  # fmt: skip
    if rank == 0:
        result.send(clock.summary())


def measure(run: Run) -> tuple[float, float]:
    """Run one training in its own processes, and return the median meta-step and communication share."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    port = find_free_network_port()
    ranks = [context.Process(target=train, args=(run, r, port, sender)) for r in range(run.processes)]
    for process in ranks:
        process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        sys.exit(f"{run.case}: training with {run.processes} processes failed: see the error above")
    finally:
        for process in ranks:
            process.join()


def table(arguments: argparse.Namespace, case: str) -> Iterator[str]:
    """Measure a case and yield its rows of the table."""
    tasks, steps = arguments.tasks, arguments.steps if case == "sine" else max(1, arguments.steps // 10)
    runs = [Run(case, "-", 1, tasks, steps, arguments)]
    for n in arguments.processes:
        if n > 1:
            runs.append(Run(case, "strong", n, tasks, steps, arguments))
            runs.append(Run(case, "weak", n, tasks * n, steps, arguments))
    rounds: list[list[tuple[float, float]]] = []
    for number in range(arguments.rounds):
        rounds.append([measure(run) for run in runs])
        print(f"{case}: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    alone = [tasks / in_round[0][0] for in_round in rounds]
    for run, measurements in zip(runs, zip(*rounds, strict=True), strict=True):
        speeds = [run.meta_batch_size / seconds for seconds, _ in measurements]
        ratio = statistics.median(s / a for s, a in zip(speeds, alone, strict=True))
        yield (
            f"| {case} | {run.scaling} | {run.processes} | {run.meta_batch_size} "
            f"| {statistics.median(speeds):.0f} | {ratio:.2f} "
            f"| {statistics.median(share for _, share in measurements):.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        help="numbers of processes (default: 1 2, or 1 to the number of GPUs)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per process (default: 1)")
    parser.add_argument(
        "--tasks", type=int, default=32, help="tasks per meta-step of one process (default: 32)"
    )
    parser.add_argument("--cases", nargs="+", default=["sine", "omniglot"], choices=["sine", "omniglot"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--steps",
        type=int,
        default=200,
        help="meta-steps per training; a tenth for omniglot (default: 200)",
    )
    arguments = parser.parse_args()
    if arguments.processes is None:
        most = torch.cuda.device_count() if arguments.device == "cuda" else 2
        arguments.processes = [n for n in range(1, most + 1) if arguments.tasks % n == 0]
    print("| case | scaling | processes | tasks/meta-step | tasks/s | speed-up | communication |")
    print("|---|---|---:|---:|---:|---:|---:|")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["maml_pipeline.cli.training"])
    for case in arguments.cases:
        for row in table(arguments, case):
            print(row, flush=True)


if __name__ == "__main__":
    main()
