"""Measure the cost of the exactness check, in which an engine is compared with plain autograd.

    python -m scripts.measure_exactness

What is measured: processor time of the check, which runs once per run, against one meta-step
of the same engine.

How to read the table: config, order, one meta-step, the training check, the check divided by the
meta-step, and the evaluation check.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import Engine, InnerLoop, Loss, build_engine
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Omniglot, SineWaves, TaskBatch

Case = tuple[nn.Module, Loss, TaskBatch, int]


def cases() -> dict[str, Callable[[], Case]]:
    """Return a function per config that builds its network, loss, meta-batch and inner steps."""

    def omniglot(ways: int, tasks: int, steps: int) -> Case:
        batch = Omniglot(ways=ways, shots=1).batch(0, "train", range(tasks))
        return ConvNet(ways), cross_entropy, batch, steps

    return {
        "sine, 25 tasks, k = 1": lambda: (MLP(), mse_loss, SineWaves().batch(0, "train", range(25)), 1),
        "Omniglot 5-way 1-shot, 32 tasks, k = 1": lambda: omniglot(5, 32, 1),
        "Omniglot 20-way 1-shot, 16 tasks, k = 5": lambda: omniglot(20, 16, 5),
    }


def seconds(function: Callable[[], object]) -> float:
    """Measure the processor time of a call in seconds."""
    start = time.process_time()
    function()
    return time.process_time() - start


def row(name: str, case: Case, engine: Engine, first_order: bool) -> str:
    """Measure and format one row of the table."""
    network, loss, batch, steps = case
    inner = InnerLoop(0.01, steps, first_order)
    engine.check(copy.deepcopy(network), loss, batch, inner)  # fills caches
    check = seconds(lambda: engine.check(network, loss, batch, inner))
    another = copy.deepcopy(network)
    evaluation = seconds(lambda: engine.check_evaluation(another, loss, batch, inner))
    step = min(seconds(lambda: engine.meta_gradient(network, loss, batch, inner)) for _ in range(3))
    order = "first" if first_order else "second"
    return (
        f"| {name} | {order} | {1e3 * step:.1f} ms | {1e3 * check:.0f} ms | {check / step:.2f} "
        f"| {1e3 * evaluation:.0f} ms |"
    )


def main() -> None:
    """Print the table: a row for each case and order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="vectorized", choices=["vectorized", "learn2learn"])
    arguments = parser.parse_args()
    print("| config | order | meta-step | check | ratio | evaluation check |")
    print("|---|---|---:|---:|---:|---:|")
    for name, make in cases().items():
        torch.manual_seed(0)
        case = make()
        for first_order in (True, False):
            print(row(name, case, build_engine(arguments.engine), first_order), flush=True)


if __name__ == "__main__":
    main()
