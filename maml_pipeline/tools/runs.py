"""Runs as they lie on disk, finished or not: what was configured, logged and tested."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import ORDERS, gradient_order, read_wandb_log, wandb_logs

Record = dict[str, float]
"""What was logged at one meta-step, by metric; `step` is the meta-step, from 0."""

SERIES = ("order_gap/cosine", "order_gap/norm_ratio", "order_gap/relative_error")


NOT_SETTINGS = {
    *("model.first_order", "model.checkpoint_inner_steps", "model.inner_steps", "data.seed"),
    *("data.num_workers", "data.tasks.init_args.root", "data.tasks.init_args.cache_dir"),
}
"""Keys of `model` and `data` by which runs may differ and still be of one comparison."""


@dataclass(frozen=True)
class Measure:
    """A measure's mean with its 95 % confidence interval over tasks, and where it was taken."""

    mean: float
    ci95: float
    split: str


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        source: The folder or file that it was read from.
        config: The resolved configuration.
        history: What was logged, in order.
        test: The test's result by metric; empty where it has not been tested.
    """

    source: Path
    config: dict[str, Any]
    history: list[Record]
    test: dict[str, float]

    @property
    def experiment(self) -> str:
        return str(self.config["run"]["experiment"])

    @property
    def order(self) -> str:
        """One of `ORDERS`; `checkpointed` is second order with checkpointed inner steps."""
        return gradient_order(self.config)

    @property
    def inner_steps(self) -> int:
        return int(self.config["model"]["inner_steps"])

    @property
    def seed(self) -> int:
        return int(self.config["seed_everything"])

    @property
    def name(self) -> str:
        return f"{self.order}-k{self.inner_steps}-s{self.seed}"

    @property
    def settings(self) -> dict[str, object]:
        """What was trained, by key, but for order, inner steps and seed; and not where or how often."""
        trained = {key: self.config.get(key) or {} for key in ("model", "data")}
        trained["trainer"] = {key: self.config["trainer"].get(key) for key in ("max_steps", "precision")}
        return {key: value for key, value in _leaves(trained) if key not in NOT_SETTINGS}

    @property
    def max_steps(self) -> int:
        """Meta-steps that were asked for; -1 for no end."""
        return int(self.config["trainer"]["max_steps"])

    @property
    def meta_steps(self) -> int:
        """Meta-steps of which something is known."""
        training = (r for r in self.history if not any(key.startswith("test/") for key in r))
        return max((int(record["step"]) + 1 for record in training), default=0)

    @property
    def is_finished(self) -> bool:
        return bool(self.test)

    @property
    def monitor(self) -> str:
        """The validation metric that chose the best checkpoint, such as `val/accuracy`."""
        return str(self.config["run"]["monitor"])

    @property
    def measure(self) -> str:
        """The monitored measure's name, such as `accuracy`."""
        return self.monitor.partition("/")[2]

    @property
    def higher_is_better(self) -> bool:
        return bool(self.config["run"]["mode"] == "max")

    @property
    def result(self) -> Measure | None:
        """The measure on the test tasks; before the test, the latest on the validation tasks."""
        if f"test/{self.measure}" in self.test:
            key = f"test/{self.measure}"
            return Measure(self.test[key], self.test.get(f"{key}_ci95", math.nan), "test")
        values, intervals = self.series(self.monitor), self.series(f"{self.monitor}_ci95")
        if not values:
            return None
        return Measure(values[-1][1], intervals[-1][1] if intervals else math.nan, "val")

    @property
    def test_curve(self) -> list[Measure]:
        """The measure on the test tasks before the first inner step, and after each."""
        name = self.measure.partition("_step_")[0]
        curve: list[Measure] = []
        while (key := f"test/{name}_step_{len(curve)}") in self.test:
            curve.append(Measure(self.test[key], self.test[f"{key}_ci95"], "test"))
        return curve

    @property
    def peak_bytes(self) -> float | None:
        """What a meta-step adds at its peak to the memory held before it."""
        return self._latest("memory/meta_step_peak_bytes")

    @property
    def held_bytes(self) -> float | None:
        """Parameters, their gradients and the optimiser's state."""
        parts = [
            self._latest(f"memory/{part}_bytes") for part in ("parameters", "gradients", "optimizer")
        ]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def meta_step_ms(self) -> float | None:
        """The median over the run of what a meta-step takes."""
        values = [value for _, value in self.series("speed/meta_step_ms")]
        return median(values) if values else None

    @property
    def flops(self) -> float | None:
        return self._latest("speed/meta_step_flops")

    @property
    def gap_cosine(self) -> float | None:
        """The mean cosine of the two orders' meta-gradients over the later half of the probe steps."""
        values = [value for _, value in self.series("order_gap/cosine")]
        return fmean(values[len(values) // 2 :]) if values else None

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Return (meta-steps done, value) wherever a metric was logged."""
        return [(int(r["step"]) + 1, r[metric]) for r in self.history if metric in r]

    def _latest(self, metric: str) -> float | None:
        values = self.series(metric)
        return values[-1][1] if values else None

    def to_json(self) -> dict[str, Any]:
        """Return what a report needs, without the rest of the history."""
        kept = {self.monitor, f"{self.monitor}_ci95", *SERIES}
        latest = {key: value for record in self.history for key, value in record.items()}
        latest |= {} if self.meta_step_ms is None else {"speed/meta_step_ms": self.meta_step_ms}
        thinned = [
            {key: value for key, value in record.items() if key in kept or key == "step"}
            for record in self.history
            if kept & record.keys()
        ]
        final = {k: v for k, v in latest.items() if k.startswith(("memory/", "speed/"))}
        final["step"] = self.meta_steps - 1  # and not that of the test, which comes after
        return {"config": self.config, "test": self.test, "history": [*thinned, final]}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run that lies in or below some paths.

    Args:
        paths: Run folders, folders of them, W&B's offline runs, or files `tradeoff.json`.

    Returns:
        Sorted by experiment, inner steps, order and seed.

    Raises:
        UserError: There is none below a path, or one cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = {run.source.resolve(): run for run in _find(path)}
        if not found:
            raise UserError(
                f"{path} holds no run: a run has config.yaml and metrics.csv, or is one of W&B's "
                "offline-run-* folders, or a tradeoff.json"
            )
        runs |= found
    return sorted(
        runs.values(), key=lambda r: (r.experiment, r.inner_steps, ORDERS.index(r.order), r.seed)
    )


def _find(path: Path) -> Iterator[Run]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run's folder, or one that holds runs")
    if path.is_file():
        yield from _from_tradeoff(path)
        return
    folders = [
        file.parent for file in path.rglob("metrics.csv") if (file.parent / "config.yaml").exists()
    ]
    yield from map(_from_folder, folders)
    # A run's folder holds W&B's log of it too, which says the same.
    strays = {
        run: logs
        for run, logs in wandb_logs(path).items()
        if not any(folder.resolve() in logs[0].parents for folder in folders)
    }
    for logs in strays.values():
        yield _from_wandb(logs)
    if not folders and not strays:
        for file in path.rglob("tradeoff.json"):
            yield from _from_tradeoff(file)


def _from_folder(folder: Path) -> Run:
    with (folder / "metrics.csv").open(newline="") as file:
        # A run that is just writing, or was killed as it was, leaves the last row short.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    test_file = folder / "test.json"
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        test = json.loads(test_file.read_text()) if test_file.exists() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    history = [{name: float(value) for name, value in row.items() if value} for row in rows]
    return _checked(folder, config, history, test)


def _from_wandb(logs: list[Path]) -> Run:
    """Read one W&B run, which has a log for each time that it was resumed."""
    history: list[Record] = []
    for log in logs:
        config, records = read_wandb_log(log)
        if records:
            # Between its last checkpoint and its kill, a run had logged what it then did again.
            history = [r for r in history if r["step"] < records[0]["step"]] + records
    test = {key: value for record in history for key, value in record.items() if key.startswith("test/")}
    return _checked(logs[-1].parent, config, history, test)


def _from_tradeoff(file: Path) -> Iterator[Run]:
    try:
        cells = json.loads(file.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a tradeoff.json; give a run's folder") from error
    for number, cell in enumerate(cells):
        yield _checked(file / str(number), cell["config"], cell["history"], cell["test"])


def _checked(source: Path, config: dict[str, Any], history: list[Record], test: dict[str, float]) -> Run:
    run = Run(source, config, history, test)
    try:
        _ = run.name, run.experiment, run.monitor, run.higher_is_better, run.max_steps
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} is not a run of this program: its config has no {error}") from error
    return run
