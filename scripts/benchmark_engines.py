"""Compare the speed of meta-steps: other libraries, this project's engines, with and without Lightning.

    python -m scripts.benchmark_engines --out benchmark     # needs the dependency group "peers"

What is timed: whole meta-steps, including the drawing of the tasks and the outer Adam step. Each
contender trains the network that is fastest for it: PyTorch's own layers for other libraries, this
project's for its engines, which differ from PyTorch's own under vmap only. The contenders are listed in
`benchmark_contenders.py`.

Against what: the baseline, a plain learn2learn loop. In every repeat each contender takes a few
meta-steps, the baseline first, so that all see the same noise of the machine.

How to read the table: the time is the median over all meta-steps; the ratio is baseline time divided
by contender time (above 1 is faster), the median over repeats; "of the limit" is the share of the
machine's matrix-product rate that the baseline's FLOPs in the contender's time amount to; "first call"
is the first meta-step, which fills caches and compiles JAX's.

Before timing, each contender's meta-gradient is checked in float64 against the learn2learn engine's.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.environment import NVML_CUDA_CHECK
from maml_pipeline.learner import accuracy
from maml_pipeline.learner.tracking import finish_tracking
from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.runs.loggers import run_loggers
from maml_pipeline.tasks import Omniglot, SineWaves, Split, Task, TaskDistribution, random_generator
from scripts import benchmark_peers as peers
from scripts.benchmark_contenders import BASELINE, CONTENDERS, Case, Setting, TimeSteps, meta_step_flops
from scripts.benchmark_jax import limit_threads
from scripts.machine_limits import Limits, machine_limits

PACKAGES = ("torch", "pytorch-lightning", "learn2learn", "higher", "torchopt", "jax", "optax", "wandb")


def _sine(steps: int) -> Case:
    name = f"sine, 25 tasks, k = {steps}"
    return Case(name, SineWaves(shots=10), MLP(), mse_loss, InnerLoop(0.01, steps), 25, 100, 20)


def _omniglot(ways: int, tasks: int, inner: InnerLoop, chunk: int | None) -> Case:
    name = f"Omniglot {ways}-way 1-shot, {tasks} tasks, k = {inner.steps}"
    distribution, network = Omniglot(ways, shots=1), ConvNet(ways)
    return Case(name, distribution, network, cross_entropy, inner, tasks, 25, 2, chunk, accuracy)


class RandomImages(TaskDistribution):
    """5-way 1-shot tasks of the size of mini-ImageNet's, with five query images a class, of noise."""

    def task(self, seed: int, split: Split, index: int) -> Task:
        """Draw a task."""
        labels = torch.arange(5)
        numbers = random_generator(seed, split, index)
        support, query = (
            torch.from_numpy(numbers.random((images, 3, 84, 84), np.float32)) for images in (5, 25)
        )
        return Task(support, labels, query, labels.repeat_interleave(5))


def _max_pool() -> Case:
    network = ConvNet(5, filters=32, downsampling="max_pool", in_channels=3, image_size=84)
    name = "84 x 84 images, max-pooling, 5-way 1-shot, 4 tasks, k = 5"
    distribution, inner = RandomImages(), InnerLoop(0.01, 5)
    return Case(name, distribution, network, cross_entropy, inner, 4, 25, 2, 1, accuracy)


CASES: dict[str, Callable[[], Case]] = {
    "sine-k1": lambda: _sine(1),
    "sine-k5": lambda: _sine(5),
    "omniglot-5way": lambda: _omniglot(5, 32, InnerLoop(0.4, 1), None),
    "omniglot-20way": lambda: _omniglot(20, 16, InnerLoop(0.1, 5), 8),
    "max-pool": _max_pool,
}
"""The choices of `--tasks`."""


class Timing(NamedTuple):
    """One contender's medians, and the time of its first call."""

    milliseconds: float
    ratio: float
    share_of_limit: float
    first_call_seconds: float


def measure(case: Case, chosen: Iterable[str], repeats: int, setting: Setting) -> dict[str, Any]:
    """Time the chosen contenders that support a case.

    Args:
        case: Tasks, network and inner loop.
        chosen: Keys of `CONTENDERS`; the baseline must be among them.
        repeats: Turns of each contender.
        setting: Device and loggers.

    Returns:
        The case's name, order, FLOPs and machine limits, and `contenders`: a `Timing` by name.
    """
    flops, limits = meta_step_flops(case), machine_limits(setting.device)
    time_steps: dict[str, TimeSteps] = {}
    first_calls: dict[str, float] = {}
    for contender in (CONTENDERS[key] for key in chosen if CONTENDERS[key].supports(case)):
        _log(f"{case.name}, {case.order}: {contender.name}")
        time_steps[contender.name] = contender.build(case, setting)
        start = time.perf_counter()
        time_steps[contender.name](1)
        first_calls[contender.name] = time.perf_counter() - start
        time_steps[contender.name](2)

    seconds: dict[str, list[float]] = {name: [] for name in time_steps}
    ratios: dict[str, list[float]] = {name: [] for name in time_steps}
    for repeat in range(repeats):
        _log(f"{case.name}, {case.order}: repeat {repeat + 1} of {repeats}")
        turn = {name: time(case.steps_per_turn) for name, time in time_steps.items()}
        baseline = statistics.median(turn[CONTENDERS[BASELINE].name])
        for name, times in turn.items():
            seconds[name] += times
            ratios[name].append(baseline / statistics.median(times))

    timings = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        share = flops / limits.flops_per_second / median
        ratio = statistics.median(ratios[name])
        timings[name] = Timing(1e3 * median, ratio, share, first_calls[name])._asdict()
    return {
        "case": case.name,
        "order": case.order,
        "flops": flops,
        "limits": limits._asdict(),
        "contenders": timings,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Format results as Markdown: a table per case, a row per contender, four columns per order."""
    lines: list[str] = []
    for case in dict.fromkeys(result["case"] for result in results):
        orders = [result for result in results if result["case"] == case]
        heads = (f"{result['order']} | ratio | of the limit | first call" for result in orders)
        lines += [f"**{case}**", "", *map(_limit, orders), ""]
        lines += ["| a meta-step of | " + " | ".join(heads) + " |"]
        lines += ["|---" + "|---:|---:|---:|---:" * len(orders) + "|"]
        for name in dict.fromkeys(name for result in orders for name in result["contenders"]):
            cells = (_cells(result["contenders"].get(name)) for result in orders)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _limit(result: dict[str, Any]) -> str:
    limits = Limits(**result["limits"])
    milliseconds = 1e3 * result["flops"] / limits.flops_per_second
    return (
        f"- {result['order']}: {result['flops'] / 1e9:.3g} GFLOP, {milliseconds:.3g} ms at the limit; "
        f"{limits}"
    )


def _cells(timing: dict[str, float] | None) -> str:
    if timing is None:
        return "- | - | - | -"
    return (
        f"{timing['milliseconds']:.2f} ms | {timing['ratio']:.2f} | {timing['share_of_limit']:.1%} "
        f"| {timing['first_call_seconds']:.1f} s"
    )


def main() -> None:
    """Run the benchmark and print the tables."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    limit_threads(arguments.threads)
    configure_logging()
    peers.ignore_warnings()
    if not torch.cuda.is_available():  # as `maml fit`: otherwise each optimizer step looks for a driver
        NVML_CUDA_CHECK.set("0")
    device = torch.device(arguments.device)

    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "results": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, run_loggers(Path(folder), {}))
        for case in (CASES[name]() for name in arguments.tasks):
            for order in arguments.orders:
                ordered = replace(case, inner=replace(case.inner, first_order=order == "first"))
                result = measure(ordered, arguments.contenders, arguments.repeats, setting)
                report["results"].append(result)
                if arguments.out is not None:  # after each: the next takes minutes
                    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
                    arguments.out.with_suffix(".md").write_text(markdown(report["results"]))
        finish_tracking()
    print(markdown(report["results"]))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write OUT.md and OUT.json")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender (default: 7)")
    some = "comma-separated (default: all): "
    parser.add_argument("--tasks", type=_choice(CASES), default=[*CASES], help=some + ", ".join(CASES))
    parser.add_argument("--orders", type=_choice(["first", "second"]), default=["first", "second"])
    keys = [*CONTENDERS]
    parser.add_argument("--contenders", type=_choice(keys), default=keys, help=some + ", ".join(keys))
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        arguments.contenders = [key for key in arguments.contenders if key != "jax"]
    arguments.contenders = [BASELINE, *(key for key in arguments.contenders if key != BASELINE)]
    return arguments


def _choice(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} not among {', '.join(names)}")
        return chosen

    return parse


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
