"""A run as a value: its config, its logged history and its test result."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.metrics_table import MetricsRow
from maml_pipeline.run_config import experiment_name, gradient_order
from maml_pipeline.runs.compatibility import MAY_CHANGE_ON_RESUME, is_listed
from maml_pipeline.text import printable
from maml_pipeline.varied import folder_suffix, varied_settings

NOT_COMPARED = {
    *("model.first_order", "model.differentiated_steps", "model.method"),
    *("model.inner_steps", "data.seed"),
    *("data.num_workers", "data.tasks.init_args.root", "data.tasks.init_args.cache_dir"),
}
"""Keys of `model` and `data` that may differ between the runs of one comparison."""


@dataclass(frozen=True)
class Estimate:
    """A measure's mean over tasks, the half-width of its 95 % confidence interval, and the split."""

    mean: float
    ci95: float
    split: str


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Args:
        source: The folder or file that it was read from.
        config: The resolved config.
        history: The logged rows, in order.
        test: The test result by metric; empty before the test.
        is_known_to_diverge: Whether a trade-off's summary tells that it stopped at a loss that was not
            finite; in a run's folder, the log does.
    """

    source: Path
    config: dict[str, Any]
    history: list[MetricsRow]
    test: dict[str, float]
    is_known_to_diverge: bool = False

    @property
    def folder(self) -> str:
        """The folder or file that the run was read from, for display."""
        return display_path(self.source)

    @property
    def is_summary(self) -> bool:
        """Whether it was read from a trade-off's summary, which omits most of the history."""
        return self.source.parent.suffix == ".json"

    @property
    def experiment(self) -> str:
        return experiment_name(self.config)

    @property
    def order(self) -> GradientOrder:
        """The gradient order, and how it is computed."""
        return gradient_order(self.config)

    @property
    def inner_steps(self) -> int:
        return int(self.config["model"]["inner_steps"])

    @property
    def seed(self) -> int:
        return int(self.config["seed_everything"])

    @property
    def name(self) -> str:
        """The name within its experiment; that of its cell if it belongs to a trade-off."""
        return f"{self.order}-k{self.inner_steps}{folder_suffix(self.varied)}-s{self.seed}"

    @property
    def varied(self) -> dict[str, Any]:
        """The value of each key that its trade-off varies, beside order, inner steps and seed."""
        return varied_settings(self.config)

    @property
    def settings(self) -> dict[str, object]:
        """The settings that all runs of a comparison share, by key; which keys are varied is one."""
        trained = {key: self.config.get(key) or {} for key in ("model", "data")}
        if "eval_inner_steps" in trained["model"] and trained["model"]["eval_inner_steps"] is None:
            trained["model"] = trained["model"] | {"eval_inner_steps": self.inner_steps}
        trained["trainer"] = {
            key: value
            for key, value in self.config["trainer"].items()
            if key == "max_steps" or not is_listed(f"trainer.{key}", MAY_CHANGE_ON_RESUME)
        }
        trained["run"] = {key: self.config["run"][key] for key in ("monitor", "mode")}
        varied = dict.fromkeys(self.varied, "varied")
        own = {
            key: value
            for key, value in _leaves(trained)
            if key not in NOT_COMPARED and not is_listed(key, varied)
        }
        return own | varied

    @property
    def max_steps(self) -> int:
        """The requested number of meta-steps; -1 for no limit."""
        return int(self.config["trainer"]["max_steps"])

    @property
    def meta_steps(self) -> int:
        """The number of meta-steps up to the last logged one."""
        training = (r for r in self.history if not any(key.startswith("test/") for key in r))
        return max((int(record["step"]) + 1 for record in training), default=0)

    @property
    def progress(self) -> str:
        """The number of meta-steps done, and the requested number if there is one."""
        return f"{self.meta_steps:,}" + (f" of {self.max_steps:,}" if self.max_steps >= 0 else "")

    @property
    def is_finished(self) -> bool:
        return bool(self.test)

    @property
    def monitor(self) -> str:
        """The validation metric that selects the best checkpoint, such as `val/accuracy`."""
        return str(self.config["run"]["monitor"])

    @property
    def measure(self) -> str:
        """The name of the monitored measure, such as `accuracy`."""
        return self.monitor.partition("/")[2]

    @property
    def measure_at_test(self) -> tuple[str, int | None]:
        """The measure without its inner step, and the inner step: `loss_step_2` gives `("loss", 2)`."""
        match = re.fullmatch(r"(.+)_step_(\d+)", self.measure)
        return (match[1], int(match[2])) if match else (self.measure, None)

    @property
    def higher_is_better(self) -> bool:
        return bool(self.config["run"]["mode"] == "max")

    @property
    def result(self) -> Estimate | None:
        """The measure on the test tasks; before the test, the latest one on the validation tasks."""
        if f"test/{self.measure}" in self.test:
            key = f"test/{self.measure}"
            return Estimate(self.test[key], _margin(self.test.get(f"{key}_ci95")), "test")
        value = self._latest(self.monitor)
        if value is None:
            return None
        return Estimate(value, _margin(self._latest(f"{self.monitor}_ci95")), "val")

    @property
    def best_validation(self) -> float | None:
        """The validation result that selected the best checkpoint.

        NaN if none was finite; `None` without any.
        """
        values = [value for _, value in self.series(self.monitor)]
        finite_values = [value for value in values if math.isfinite(value)] or [math.nan]
        best = max if self.higher_is_better else min
        return best(finite_values) if values else None

    @property
    def test_curve(self) -> list[Estimate]:
        """The measure on the test tasks before the first inner step and after each step."""
        name, _ = self.measure_at_test
        curve: list[Estimate] = []
        while (key := f"test/{name}_step_{len(curve)}") in self.test:
            curve.append(Estimate(self.test[key], _margin(self.test.get(f"{key}_ci95")), "test"))
        return curve

    @property
    def peak_bytes(self) -> float | None:
        """Peak memory of a meta-step beyond the memory held before it, in bytes."""
        return self._latest("memory/meta_step_peak_bytes")

    @property
    def held_bytes(self) -> float | None:
        """Memory of the parameters, their gradients and the optimizer state, in bytes."""
        parts = [
            self._latest(f"memory/{part}_bytes") for part in ("parameters", "gradients", "optimizer")
        ]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def meta_step_ms(self) -> float | None:
        """The median time of a meta-step, in milliseconds."""
        values = [value for _, value in self.series("speed/meta_step_ms")]
        return median(values) if values else None

    @property
    def parallel_cells(self) -> int:
        """How many cells of a trade-off were trained side by side while the time was measured."""
        values = (value for _, value in self.series("speed/parallel_cells"))
        return int(max(filter(math.isfinite, values), default=1))  # a damaged file may hold NaN

    @property
    def flops(self) -> float | None:
        return self._latest("speed/meta_step_flops")

    @property
    def gap_cosine(self) -> float | None:
        """The mean cosine of the two orders' meta-gradients over the second half of the probes."""
        values = [value for _, value in self.series("order_gap/cosine")]
        return mean(values[len(values) // 2 :]) if values else None

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Return the logged values of a metric as pairs (meta-steps done, value)."""
        return [(int(r["step"]) + 1, r[metric]) for r in self.history if metric in r]

    def _latest(self, metric: str) -> float | None:
        values = self.series(metric)
        return values[-1][1] if values else None


def display_path(path: Path) -> str:
    """Return a path as printable text, relative to the working directory if it is below it."""
    here = Path.cwd()
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)


def mean(values: Sequence[float]) -> float:
    """Return the mean; unlike `fmean`, even if a value or the sum is infinite."""
    return sum(value / len(values) for value in values)


def finite(value: float | None) -> float | None:
    """Return a number that JSON can represent; `None` if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _margin(value: float | None) -> float:
    return value if value is not None and value >= 0 else math.nan


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))
