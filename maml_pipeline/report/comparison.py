"""Group runs by experiment, average them over seeds and take ratios to first order."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from maml_pipeline.gradient_order import Method
from maml_pipeline.runs.run import Estimate, Run, finite, mean
from maml_pipeline.text import printable

COSTS = ("peak_bytes", "meta_step_ms", "flops")
"""Properties of `Run` that are also compared as ratios to first order."""

QUANTITIES = (*COSTS, "held_bytes", "gap_cosine")
"""Properties of `Run` that are averaged over seeds."""


@dataclass(frozen=True)
class ComparisonRow:
    """The runs of one experiment, method and number of inner steps, averaged over seeds.

    Args:
        runs: Runs that differ only in their seed.
        first_order_row: The first-order row with as many inner steps, the denominator of all ratios;
            `None` if there is none.
    """

    runs: list[Run]
    first_order_row: "ComparisonRow | None"

    @property
    def method(self) -> Method:
        return self.runs[0].method

    @property
    def inner_steps(self) -> int:
        return self.runs[0].inner_steps

    @property
    def split(self) -> str | None:
        """The split of the result: `test` if any run was tested, else `val`; `None` without a result."""
        splits = {run.result.split for run in self.runs if run.result is not None}
        return "test" if "test" in splits else "val" if splits else None

    @property
    def evaluated(self) -> list[Run]:
        """The runs with a result on `split`."""
        return [run for run in self.runs if run.result is not None and run.result.split == self.split]

    @property
    def unfinished(self) -> list[Run]:
        """The runs that the result leaves out, such as one that was killed before its test."""
        return [run for run in self.runs if run not in self.evaluated]

    @property
    def result(self) -> Estimate | None:
        """The mean over seeds of the result and of its confidence interval.

        All seeds are tested on the same tasks, so their mean interval is an upper bound for the
        interval of the mean.
        """
        results = [run.result for run in self.evaluated if run.result is not None]
        if self.split is None:
            return None
        return Estimate(mean([r.mean for r in results]), mean([r.ci95 for r in results]), self.split)

    @property
    def result_range(self) -> tuple[float, float] | None:
        """The lowest and the highest result over the seeds; `None` with fewer than two results."""
        results = [run.result.mean for run in self.evaluated if run.result is not None]
        return (min(results), max(results)) if len(results) > 1 else None

    @property
    def parallel_cells(self) -> int:
        """How many cells of a trade-off were trained side by side while the times were measured."""
        return max(run.parallel_cells for run in self.runs)

    def mean(self, quantity: str) -> float | None:
        """Return the mean over seeds of one of `QUANTITIES`; `None` if no run has it."""
        runs = self.evaluated or self.runs
        known = [value for run in runs if (value := getattr(run, quantity)) is not None]
        return mean(known) if known else None

    def ratio(self, quantity: str) -> float | None:
        """Return a quantity as a multiple of first order's; `None` if either is unknown."""
        own = self.mean(quantity)
        other = None if self.first_order_row is None else self.first_order_row.mean(quantity)
        return own / other if own is not None and other else None

    def to_json(self) -> dict[str, Any]:
        """Return every number of the row; `None` for what is unknown."""
        result, result_range = self.result, self.result_range
        return {
            "experiment": self.runs[0].experiment,
            "order": self.method.order,
            "method": self.method,
            "inner_steps": self.inner_steps,
            "seeds": [run.seed for run in self.evaluated],
            "unfinished_seeds": [run.seed for run in self.unfinished],
            "measure": self.runs[0].measure,
            "split": None if result is None else result.split,
            "mean": None if result is None else finite(result.mean),
            "ci95": None if result is None else finite(result.ci95),
            "parallel_cells": self.parallel_cells,
            "lowest_and_highest_result": result_range and [finite(value) for value in result_range],
            **{quantity: finite(self.mean(quantity)) for quantity in QUANTITIES},
            **{f"{cost}_to_first_order": finite(self.ratio(cost)) for cost in COSTS},
        }


def compare(runs: Iterable[Run]) -> dict[str, list[ComparisonRow]]:
    """Group runs by experiment.

    Runs of one experiment that differ in more than order, inner steps and seed, such as the inner
    learning rate, become separate groups: their mean would be meaningless. So does a run that repeats
    the settings and the seed of another: it is not one more seed.

    Args:
        runs: In any order; their order decides that of groups and seeds.

    Returns:
        The rows of each group, sorted by inner steps and method, under its title: the experiment, and
        the settings that distinguish it from others of the same name.
    """
    groups: dict[str, list[ComparisonRow]] = {}
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.experiment, []).append(run)
    for same_name in by_name.values():
        for name, same_settings in _split_by_settings(same_name):
            for number, distinct in enumerate(_split_repeats(same_settings), 1):
                title = printable(name) + (f", repeat {number}" if number > 1 else "")
                groups[_unique(title, groups)] = [*_rows(distinct)]
    return groups


def _split_by_settings(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Split runs of one experiment by the settings in which they differ; yield (title, runs)."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, settings, strict=True):
        values = (f"{key} {own.get(key)}" for key in differing)
        groups.setdefault(", ".join((run.experiment, *values)), []).append(run)
    yield from groups.items()


def _split_repeats(runs: Iterable[Run]) -> list[list[Run]]:
    """Split runs with the same settings so that no group holds a method, inner steps and seed twice."""
    groups: list[dict[str, Run]] = []
    for run in runs:
        group = next((group for group in groups if run.name not in group), None)
        if group is None:
            groups.append(group := {})
        group[run.name] = run
    return [[*group.values()] for group in groups]


def _unique(title: str, taken: Container[str]) -> str:
    """Return the title, numbered if it is taken: different values can have the same text."""
    return next(t for n in count(1) if (t := title if n == 1 else f"{title} ({n})") not in taken)


def _rows(runs: Iterable[Run]) -> Iterator[ComparisonRow]:
    by_row: dict[tuple[int, Method], list[Run]] = {}
    for run in runs:
        by_row.setdefault((run.inner_steps, run.method), []).append(run)
    for inner_steps in sorted({steps for steps, _ in by_row}):
        first_order_row: ComparisonRow | None = None
        for method in Method:  # first order comes first: the others need its row
            if same_method := by_row.get((inner_steps, method)):
                row = ComparisonRow(same_method, first_order_row)
                if method is Method.FIRST_ORDER:
                    first_order_row = row
                yield row


def findings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Describe, in a sentence for each second-order row, its result and cost relative to first order."""
    sentences = []
    for row in rows:
        if row.first_order_row is None or row.result is None or row.first_order_row.result is None:
            continue
        own, other = row.result, row.first_order_row.result
        if own.split != other.split:
            continue
        costs = [
            f"{ratio:.2f} times the {name}"
            for name, cost in (("peak memory", "peak_bytes"), ("time", "meta_step_ms"))
            if (ratio := row.ratio(cost)) is not None
        ]
        checkpointed = "checkpointed " if row.method is Method.CHECKPOINTED else ""
        steps = f"{row.inner_steps} inner step{'' if row.inner_steps == 1 else 's'}"
        split = {"test": "test", "val": "validation"}[own.split]
        measure = printable(row.runs[0].measure)
        sentences.append(
            f"Trained with {steps}, {checkpointed}second order reached a {split} {measure} of "
            f"{own.mean:.4f} and first order {other.mean:.4f}"
            + (f", at {' and '.join(costs)}." if costs else ".")
        )
    return sentences
