"""Measure what the probes cost, as a share of training time.

    python -m scripts.benchmark_probes configs/sine.yaml configs/omniglot/5way_1shot.yaml

What is measured: each config is trained with a probe step every tenth meta-step, and the median probe
step is compared with the median of the other meta-steps.

How to read the table: "extra" is the time that a probe step adds to a meta-step; "every" is the
config's `probes.every`; "share" is the added time relative to that many meta-steps.
"""

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning import Trainer

from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.cli.training import TrainingCommand
from scripts.benchmark_contenders import StepTimer

EVERY = 10


def measure(config: Path, first_order: bool, probe_steps: int) -> None:
    """Train a config for a number of probe steps and print a row of the table."""
    timer = StepTimer(torch.device("cpu"))

    class TimedCLI(TrainingCommand):
        def after_fit(self) -> None:
            pass

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(timer)  # type: ignore[attr-defined]
            return trainer

    steps = EVERY * (probe_steps + 2)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "run.dir": Path(folder) / "run",
            "run.checkpoint_every": 10**6,
            "model.first_order": str(first_order).lower(),
            "probes.every": EVERY,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": "false",
        }
        overrides = [str(text) for key, value in settings.items() for text in (f"--{key}", value)]
        TimedCLI("fit", ["--config", str(config), *overrides])

    spans = [end - start for start, end in pairwise(timer.ends)]
    numbered = [*enumerate(spans, start=2)][2 * EVERY :]  # without two probe steps of warm-up
    plain = statistics.median(span for number, span in numbered if number % EVERY)
    probed = statistics.median(span for number, span in numbered if number % EVERY == 0)
    every = yaml.safe_load(config.read_text())["probes"]["every"]
    share = (probed - plain) / (every * plain)
    order = "first" if first_order else "second"
    print(
        f"| {config.stem} | {order} | {plain * 1e3:.2f} ms | {(probed - plain) * 1e3:.1f} ms "
        f"| {every} | {share:.2%} |",
        flush=True,
    )


def main() -> None:
    """Print the table: a row for each config and order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, help="configs to train")
    parser.add_argument("--probe_steps", type=int, default=20, help="probe steps (default: 20)")
    arguments = parser.parse_args()
    configure_logging()
    print("| config | order | meta-step | extra | every | share |")
    print("|---|---|---:|---:|---:|---:|")
    for config in arguments.configs:
        for first_order in (True, False):
            measure(config, first_order, arguments.probe_steps)


if __name__ == "__main__":
    main()
