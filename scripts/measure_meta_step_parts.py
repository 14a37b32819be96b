"""Time the parts of a meta-step with the engine `native`, as they follow each other in training.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.measure_meta_step_parts        # one thread; medians over many meta-steps

The parts are timed inside the loop, since those of a short meta-step take up to three times as long
there as alone: each one finds the caches of the processor full of the others' code. The matrix products
are timed in meta-steps of their own, in which the machine code does nothing else.

A second table compares meta-steps without the Trainer and those of `maml fit`, taken in turns. The
machine code is the same: if it takes longer, it finds the caches full; the rest is Python.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.environment import NVML_CUDA_CHECK
from maml_pipeline.learner.tracking import finish_tracking
from maml_pipeline.meta_gradient import NativeEngine
from maml_pipeline.meta_gradient.native.job import STEP_WORDS, Job
from maml_pipeline.meta_gradient.native.products import gemm
from maml_pipeline.runs.loggers import run_loggers
from scripts.benchmark_contenders import CONTENDERS, Case, Setting, draw
from scripts.benchmark_engines import CASES

META_STEPS = {"sine-k1": 2000, "sine-k5": 2000, "omniglot-5way": 30, "omniglot-20way": 10}
"""How many are timed of each case; as many tenths before them are not."""
PARTS = (
    *("drawing tasks", "meta-gradient", "its machine code", "its matrix products"),
    *("setting gradients", "Adam"),
)


IN_TURNS = tuple(f"{part}, {where}" for where in ("bare", "Trainer") for part in ("all", "code", "rest"))
TURNS = 4

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


def measure_in_turns(case: Case, meta_steps: int) -> list[float]:
    """Return the median seconds of a meta-step, of its machine code and of the rest.

    The first three are those without the Trainer, the last three those of `maml fit`.
    """
    rows: list[list[tuple[float, float]]] = [[], []]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(torch.device("cpu"), run_loggers(Path(folder), {}))
        contenders = [CONTENDERS[name].build(case, setting) for name in ("native", "native-trainer")]
        for _ in range(TURNS):
            jobs = 0
            for take, found in zip(contenders, rows, strict=True):
                with timed_jobs(lambda job: job) as seconds:
                    steps = take(meta_steps)
                jobs = jobs or len(seconds) // meta_steps
                own = seconds[-jobs * meta_steps :]  # the Trainer takes some before those that are timed
                of_steps = (sum(own[first : first + jobs]) for first in range(0, len(own), jobs))
                found += zip(steps, of_steps, strict=True)
        finish_tracking()
    return [
        statistics.median(column)
        for found in rows
        for column in zip(*((step, code, step - code) for step, code in found), strict=True)
    ]


def main() -> None:
    """Print two tables: a row for each case and order, times in ms."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # as `maml fit`: otherwise each optimizer step looks for a driver
        NVML_CUDA_CHECK.set("0")
    configure_logging()
    for heading, measured in ((PARTS, measure), (IN_TURNS, measure_in_turns)):
        print(f"\n| a meta-step of | {' | '.join(heading)} |\n|---|{'---:|' * len(heading)}")
        for name, meta_steps in META_STEPS.items():
            if measured is measure_in_turns and name == "omniglot-20way":
                continue  # whose meta-steps take too long for anything else to be seen
            for first_order in (True, False):
                case = CASES[name]()
                case = replace(case, inner=replace(case.inner, first_order=first_order))
                cells = " | ".join(f"{1000 * seconds:.3g} ms" for seconds in measured(case, meta_steps))
                print(f"| {case.name}, {case.order} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
