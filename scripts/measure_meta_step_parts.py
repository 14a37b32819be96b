"""Time the parts of a sine meta-step with the engine `native`, as they follow each other in training.

    python -m scripts.measure_meta_step_parts        # one thread; medians over 2,000 meta-steps

The parts are timed inside the loop, since they take up to three times as long there as alone: each one
finds the caches of the processor full of the others' code.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import torch

from maml_pipeline.environment import NVML_CUDA_CHECK
from maml_pipeline.meta_gradient import NativeEngine
from maml_pipeline.meta_gradient.native.job import Job
from scripts.benchmark_contenders import Case, draw
from scripts.benchmark_engines import CASES

STEPS, WARM_UP = 2000, 100
PARTS = ("drawing tasks", "meta-gradient", "of which machine code", "setting gradients", "Adam")


def measure(case: Case) -> list[float]:
    """Return the median seconds of each part."""
    network, engine, cpu = case.network, NativeEngine(), torch.device("cpu")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    inside = 0.0

    def timed(run: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            nonlocal inside
            start = time.perf_counter()
            run(*arguments)
            inside += time.perf_counter() - start

        return call

    rows = []
    with mock.patch.object(Job, "run", timed(Job.run)):
        for step in range(WARM_UP + STEPS):
            inside, times = 0.0, [time.perf_counter()]
            batch = draw(case, step, cpu)
            times.append(time.perf_counter())
            gradient = engine.meta_gradient(network, case.loss, batch, case.inner).gradient
            times.append(time.perf_counter())
            optimizer.zero_grad()
            for name, p in network.named_parameters():
                p.grad = gradient[name]
            times.append(time.perf_counter())
            optimizer.step()
            times.append(time.perf_counter())
            drawing, computing, setting, adam = (b - a for a, b in pairwise(times))
            rows.append((drawing, computing, inside, setting, adam))
    return [statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True)]


def main() -> None:
    """Print a table: a row for each task and order, the parts in ms."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # as `maml fit`: otherwise each optimizer step looks for a driver
        NVML_CUDA_CHECK.set("0")
    print(f"| sine | {' | '.join(PARTS)} |\n|---|{'---:|' * len(PARTS)}")
    for name in ("sine-k1", "sine-k5"):
        for first_order in (True, False):
            case = CASES[name]()
            case = replace(case, inner=replace(case.inner, first_order=first_order))
            cells = " | ".join(f"{1000 * seconds:.2f} ms" for seconds in measure(case))
            print(f"| k = {case.inner.steps}, {case.order} | {cells} |")


if __name__ == "__main__":
    main()
