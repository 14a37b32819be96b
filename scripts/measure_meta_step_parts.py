"""Time the parts of a meta-step with the engine `native`, as they follow each other in training.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.measure_meta_step_parts        # one thread; medians over many meta-steps

The parts are timed inside the loop, since those of a short meta-step take up to three times as long
there as alone: each one finds the caches of the processor full of the others' code. The matrix products
are timed in meta-steps of their own, in which the machine code does nothing else.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from maml_pipeline.environment import NVML_CUDA_CHECK
from maml_pipeline.meta_gradient import NativeEngine
from maml_pipeline.meta_gradient.native.job import STEP_WORDS, Job
from maml_pipeline.meta_gradient.native.products import gemm
from scripts.benchmark_contenders import Case, draw
from scripts.benchmark_engines import CASES

META_STEPS = {"sine-k1": 2000, "sine-k5": 2000, "omniglot-5way": 30, "omniglot-20way": 10}
"""How many are timed of each case; as many tenths before them are not."""
PARTS = (
    *("drawing tasks", "meta-gradient", "its machine code", "its matrix products"),
    *("setting gradients", "Adam"),
)


RUN = Job.run


def measure(case: Case, meta_steps: int) -> list[float]:
    """Return the median seconds of each part."""
    network, engine, cpu = case.network, NativeEngine(), torch.device("cpu")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    rows = []
    with timed_jobs(lambda job: job) as seconds:
        for step in range(meta_steps + meta_steps // 10):
            seconds.clear()
            times = [time.perf_counter()]
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
            rows.append((drawing, computing, sum(seconds), setting, adam))
    products = []
    with timed_jobs(products_of) as seconds:
        for _ in range(meta_steps + meta_steps // 10):
            seconds.clear()
            engine.meta_gradient(network, case.loss, batch, case.inner)
            products.append(sum(seconds))
    columns = [*zip(*rows, strict=True)]
    columns.insert(PARTS.index("its matrix products"), tuple(products))
    return [statistics.median(column[meta_steps // 10 :]) for column in columns]


@contextmanager
def timed_jobs(instead: Callable[[Job], Job]) -> Iterator[list[float]]:
    """Carry out other jobs in place of those of an engine, and yield the list of their seconds."""
    seconds: list[float] = []

    def run(job: Job, *arguments: Any) -> None:
        other = instead(job)
        start = time.perf_counter()
        RUN(other, *arguments)
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(Job, "run", run):
        yield seconds


@cache
def products_of(job: Job) -> Job:
    """Return a job with the matrix products of another one, and nothing else."""
    products = Job()
    places = len(job.steps) // STEP_WORDS
    for step, program in zip(range(places), job.programs, strict=True):
        products.programs.append(program.only(gemm))
        words = job.steps[step * STEP_WORDS : (step + 1) * STEP_WORDS]
        products.steps.extend((*products.programs[-1].buffer(), *words[2:]))
    return products


def main() -> None:
    """Print a table: a row for each case and order, the parts in ms."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # as `maml fit`: otherwise each optimizer step looks for a driver
        NVML_CUDA_CHECK.set("0")
    print(f"| a meta-step of | {' | '.join(PARTS)} |\n|---|{'---:|' * len(PARTS)}")
    for name, meta_steps in META_STEPS.items():
        for first_order in (True, False):
            case = CASES[name]()
            case = replace(case, inner=replace(case.inner, first_order=first_order))
            cells = " | ".join(f"{1000 * seconds:.3g} ms" for seconds in measure(case, meta_steps))
            print(f"| {case.name}, {case.order} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
