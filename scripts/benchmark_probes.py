"""What the probes cost: the excess time of probe steps, as a share of training.

    python -m scripts.benchmark_probes configs/sine.yaml configs/omniglot/5way_1shot.yaml

Trains each config with a probe step every tenth meta-step, and compares those with the others: what a
probe step takes more, over the config's own `probes.every` meta-steps, is the share.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Callback, Trainer

from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.cli.training import TrainingCommand

EVERY = 10


class StepClock(Callback):
    """Takes the time from one meta-step's end to the next one's, callbacks and all."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Remember when."""
        self.ends.append(time.perf_counter())


def measure(config: Path, first_order: bool, probe_steps: int) -> None:
    """Train for so many probe steps and print a row."""
    clock = StepClock()

    class Clocked(TrainingCommand):
        def after_fit(self) -> None:
            pass

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(clock)  # type: ignore[attr-defined]
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
        Clocked("fit", ["--config", str(config), *overrides])

    spans = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    numbered = [*enumerate(spans, start=2)][2 * EVERY :]  # the first two probe steps warm up
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
    """Print a row for each config and order."""
    parser = argparse.ArgumentParser(description="What the probes cost, as a share of training.")
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--probe_steps", type=int, default=20)
    arguments = parser.parse_args()
    configure_logging()
    print("| config | order | a meta-step | a probe step takes more | every | share |")
    print("|---|---|---:|---:|---:|---:|")
    for config in arguments.configs:
        for first_order in (True, False):
            measure(config, first_order, arguments.probe_steps)


if __name__ == "__main__":
    main()
