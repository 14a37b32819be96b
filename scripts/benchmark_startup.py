"""Measure how long the `maml` command takes to start.

    python -m scripts.benchmark_startup --config toy --config sine --repeat 5

What is measured: for `maml fit` the time from the start of the process to the end of the first
meta-step, with W&B logging offline; for the other commands the time until they have ended. Each is run
once before, so that files are in the page cache, and then `--repeat` times in turns.

With `--uncompiled`, each start finds no machine code of the engine `native`, as the first one on a
machine does.

How to read the table: the median of the elapsed seconds with the smallest one in parentheses, and the
median of the CPU seconds of the command's own process, which depend less on what else the machine does.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path
from pytorch_lightning import Callback, LightningModule, Trainer

from maml_pipeline.environment import child_environment

ROOT = Path(__file__).parent.parent
FILE = "first_meta_step.txt"

ENDING = {
    "maml --help": ["--help"],
    "maml derive": ["derive"],
    "a wrong key": ["fit", "--config", "toy", "--model.iner_lr", "0.1"],
    "a wrong value": ["fit", "--config", "toy", "--model.inner_lr", "fast"],
}
"""Commands that are measured until they have ended."""


class Times(NamedTuple):
    """Seconds that passed, and CPU seconds that the process took."""

    elapsed: float
    cpu: float


class FirstMetaStep(Callback):
    """Write down when the first meta-step has ended."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the time of day and the CPU seconds of this process."""
        Path(FILE).write_text(f"{time.time()} {time.process_time()}")


def time_to_first_meta_step(config: str, uncompiled: bool) -> Times:
    """Start a training of one meta-step.

    Args:
        config: The config.
        uncompiled: Without machine code that was kept before.
    """
    callback = f"{__spec__.name}.{FirstMetaStep.__name__}"
    arguments = ["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.callbacks+", callback]
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": str(_cache_without_machine_code(folder))} if uncompiled else {}
        began = time.time()
        _run(arguments, folder, **cache).check_returncode()
        ended, cpu = map(float, (Path(folder) / FILE).read_text().split())
    return Times(ended - began, cpu)


def time_to_end(arguments: list[str]) -> Times:
    """Run a command that ends by itself."""
    with tempfile.TemporaryDirectory() as folder:
        began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        _run(arguments, folder)
        ended, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    return Times(ended - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _cache_without_machine_code(folder: str) -> Path:
    """Return a folder for the user's caches, with links to those of the package but for machine code."""
    cache = Path(folder) / "cache"
    (cache / "maml_pipeline").mkdir(parents=True)
    for kept in user_cache_path("maml_pipeline").iterdir():
        if not kept.name.startswith("compiled-"):
            (cache / "maml_pipeline" / kept.name).symlink_to(kept)
    return cache


def _run(arguments: list[str], folder: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = child_environment(PYTHONPATH=path, WANDB_MODE="offline", **variables)
    command = [sys.executable, "-m", "maml_pipeline", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure how long the maml command takes to start.")
    parser.add_argument("--config", action="append", help="a config of maml fit; default: toy")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--uncompiled", action="store_true", help="only maml fit, each time without machine code"
    )
    settings = parser.parse_args()

    fits = {f"maml fit --config {config}": config for config in settings.config or ["toy"]}
    ending = {} if settings.uncompiled else ENDING
    times: dict[str, list[Times]] = {name: [] for name in [*fits, *ending]}
    for _ in range(settings.repeat + 1):
        for name, measured in times.items():
            measured.append(
                time_to_first_meta_step(fits[name], settings.uncompiled)
                if name in fits
                else time_to_end(ending[name])
            )

    print("| command | seconds | CPU seconds |\n|---|---:|---:|")
    for name, (_, *measured) in times.items():
        elapsed = [one.elapsed for one in measured]
        cpu = statistics.median(one.cpu for one in measured)
        print(f"| {name} | {statistics.median(elapsed):.2f} ({min(elapsed):.2f}) | {cpu:.2f} |")


if __name__ == "__main__":
    main()
