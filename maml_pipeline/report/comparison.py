"""The orders side by side: runs that differ by their seed alone are one row."""

import math
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from maml_pipeline.meta_gradient.order import Method
from maml_pipeline.runs.run import Estimate, Run, finite, mean
from maml_pipeline.text import printable

FIGURES = ("peak_bytes", "meta_step_ms", "flops", "held_bytes", "gap_cosine")
"""Properties of `Run` that are averaged over seeds; of the first three, ratios are taken."""


@dataclass(frozen=True)
class Row:
    """The runs of one experiment, order and number of inner steps.

    Args:
        runs: They differ by their seed.
        first: The first-order row of the same inner steps, to which ratios are taken; `None` where
            there is none.
    """

    runs: list[Run]
    first: "Row | None"

    @property
    def method(self) -> Method:
        return self.runs[0].method

    @property
    def inner_steps(self) -> int:
        return self.runs[0].inner_steps

    @property
    def split(self) -> str | None:
        """What the result is of: `test`, or `val` where none is tested; `None` for no result."""
        splits = {run.result.split for run in self.runs if run.result is not None}
        return "test" if "test" in splits else "val" if splits else None

    @property
    def measured(self) -> list[Run]:
        """The runs that the result is of; a run that was killed before its test is none of a test's."""
        return [run for run in self.runs if run.result is not None and run.result.split == self.split]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that the result is not of."""
        return [run for run in self.runs if run not in self.measured]

    @property
    def result(self) -> Estimate | None:
        """The mean over seeds of the result and of its interval.

        Every seed is tested on the same tasks, so the mean interval is an upper bound for that of
        the mean.
        """
        results = [run.result for run in self.measured if run.result is not None]
        if self.split is None:
            return None
        return Estimate(mean([r.mean for r in results]), mean([r.ci95 for r in results]), self.split)

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest seed's result; `None` for one seed alone."""
        results = [run.result.mean for run in self.measured if run.result is not None]
        return (min(results), max(results)) if len(results) > 1 else None

    def mean(self, figure: str) -> float | None:
        """Return the mean over seeds of one of `FIGURES`; `None` where no run has it."""
        runs = self.measured or self.runs
        known = [value for run in runs if (value := getattr(run, figure)) is not None]
        return mean(known) if known else None

    def ratio(self, figure: str) -> float | None:
        """Return a figure as a multiple of first order's."""
        own, other = self.mean(figure), None if self.first is None else self.first.mean(figure)
        return own / other if own is not None and other else None

    def to_json(self) -> dict[str, Any]:
        """Return every figure of the row; `None` for what is not known."""
        result, spread = self.result, self.spread
        return {
            "experiment": self.runs[0].experiment,
            "order": self.method,
            "inner_steps": self.inner_steps,
            "seeds": [run.seed for run in self.measured],
            "unfinished_seeds": [run.seed for run in self.unfinished],
            "measure": self.runs[0].measure,
            "split": None if result is None else result.split,
            "mean": None if result is None else finite(result.mean),
            "ci95": None if result is None else finite(result.ci95),
            "lowest_and_highest_seed": None if spread is None else [finite(seed) for seed in spread],
            **{figure: finite(self.mean(figure)) for figure in FIGURES},
            **{f"{figure}_to_first_order": finite(self.ratio(figure)) for figure in FIGURES[:3]},
        }

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of `headers`."""
        cosine = self.mean("gap_cosine")
        return (
            self.method,
            str(self.inner_steps),
            self._seeds_text(),
            self._result_text(),
            self._cost_text("peak_bytes", 1, "B"),
            self._cost_text("meta_step_ms", 1e-3, "s"),
            self._cost_text("flops", 1, "FLOP"),
            "-" if cosine is None else f"{cosine:.3f}",
        )

    def _seeds_text(self) -> str:
        seeds = ", ".join(str(run.seed) for run in self.measured)
        if not self.unfinished:
            return seeds
        unfinished = f"unfinished: {', '.join(str(run.seed) for run in self.unfinished)}"
        return f"{seeds} ({unfinished})" if seeds else unfinished

    def _result_text(self) -> str:
        result = self.result
        if result is None:
            return "-"
        text = f"{result.mean:.4f} ± {result.ci95:.4f}"
        if self.spread is not None:
            text += " ({:.4f} to {:.4f})".format(*self.spread)
        return text if result.split == "test" else f"{text}, validation"

    def _cost_text(self, figure: str, scale: float, unit: str) -> str:
        value, ratio = self.mean(figure), self.ratio(figure)
        if value is None:
            return "-"
        if not math.isfinite(value):
            return str(value)
        text = EngFormatter(unit, places=2)(value * scale)
        return text if ratio is None else f"{text} ({ratio:.2f}x)"


def headers(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the columns' names for the rows of one experiment."""
    run = rows[0].runs[0]
    seeds = " (seeds from to)" if any(row.spread for row in rows) else ""
    return (
        *("order", "inner steps", "seeds", f"{printable(run.measure)} ± 95 % CI{seeds}"),
        *("peak memory", "a meta-step", "FLOPs", "order gap, cosine"),
    )


def compare(runs: Iterable[Run]) -> dict[str, list[Row]]:
    """Group runs by what they have in common.

    Runs of one experiment that differ by more than order, inner steps and seed, say in their inner
    learning rate, are told apart: a mean over them would be of nothing. A run that repeats another one's
    settings and seed is told apart too: it is no further seed.

    Args:
        runs: In the order of `find_runs`.

    Returns:
        By experiment, and what tells it from others of its name, the rows by inner steps and order.
    """
    groups: dict[str, list[Row]] = {}
    for _, same_name in groupby(runs, lambda run: run.experiment):
        for name, alike in _alike([*same_name]):
            for number, once in enumerate(_repeats(alike), 1):
                title = printable(name) + (f", repeat {number}" if number > 1 else "")
                groups[_unique(title, groups)] = [*_rows(once)]
    return groups


def _unique(title: str, taken: Container[str]) -> str:
    """Return a title that is not taken: two values may be written alike."""
    return next(t for n in count(1) if (t := title if n == 1 else f"{title} ({n})") not in taken)


def _rows(runs: Iterable[Run]) -> Iterator[Row]:
    for _, same_steps in groupby(runs, lambda run: run.inner_steps):
        first: Row | None = None
        for method, same_method in groupby(same_steps, lambda run: run.method):
            row = Row([*same_method], first)
            if method is Method.FIRST_ORDER:
                first = row
            yield row


def _alike(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Split runs of one experiment by the settings in which they differ."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, settings, strict=True):
        told_apart = (f"{key} {own.get(key)}" for key in differing)
        groups.setdefault(", ".join((run.experiment, *told_apart)), []).append(run)
    yield from groups.items()


def _repeats(runs: Iterable[Run]) -> list[list[Run]]:
    """Split runs of the same settings so that each order, inner steps and seed is there once."""
    groups: list[dict[str, Run]] = []
    for run in runs:
        group = next((group for group in groups if run.name not in group), None)
        if group is None:
            groups.append(group := {})
        group[run.name] = run
    return [[*group.values()] for group in groups]


def findings(rows: Sequence[Row]) -> list[str]:
    """Say in a sentence what each order bought over first order, and what it cost."""
    sentences = []
    for row in rows:
        if row.first is None or row.result is None or row.first.result is None:
            continue
        own, other = row.result, row.first.result
        if own.split != other.split:
            continue
        costs = [
            f"{ratio:.2f} times the {name}"
            for name, figure in (("peak memory", "peak_bytes"), ("time", "meta_step_ms"))
            if (ratio := row.ratio(figure)) is not None
        ]
        order = {"second": "second order", "checkpointed": "checkpointed second order"}[row.method]
        steps = f"{row.inner_steps} inner step{'' if row.inner_steps == 1 else 's'}"
        measure = printable(row.runs[0].measure)
        sentences.append(
            f"With {steps} in training, {order} reached a {own.split} {measure} of {own.mean:.4f} where "
            f"first order reached {other.mean:.4f}" + (f", for {' and '.join(costs)}." if costs else ".")
        )
    return sentences


def print_comparison(experiment: str, rows: list[Row]) -> None:
    """Print an experiment's rows as a table, each with the folders of its runs."""
    table = Table(title=experiment)
    for header in (*headers(rows), "folder"):
        is_text = header in ("order", "folder")
        table.add_column(header, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.cells(), "\n".join(run.folder for run in row.runs))
    # Off a terminal there is no width to keep to: a table that is cut says nothing.
    width = None if sys.stdout.isatty() else 10_000
    # Names may look like markup: none of the text is.
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
