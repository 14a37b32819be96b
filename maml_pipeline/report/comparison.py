"""Group runs by experiment, average them over seeds and take ratios to first order."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.choice import Choice, Setting, choose, varied_in
from maml_pipeline.runs.run import Estimate, Run, finite, mean
from maml_pipeline.text import printable
from maml_pipeline.varied import config_value, identity

COSTS = ("peak_bytes", "meta_step_ms", "flops")
"""Properties of `Run` that are also compared as ratios to first order."""

QUANTITIES = (*COSTS, "held_bytes", "gap_cosine")
"""Properties of `Run` that are averaged over seeds."""


@dataclass(frozen=True)
class ComparisonRow:
    """The runs of one experiment, order, number of inner steps and setting, averaged over seeds.

    Args:
        runs: Runs that differ only in their seed.
        first_order_row: The first-order row with as many inner steps, the denominator of all ratios;
            `None` if there is none. If keys are varied, it is first order's chosen row.
        choice: How its order's settings were compared; `None` if there is only one.
    """

    runs: list[Run]
    first_order_row: "ComparisonRow | None"
    choice: Choice | None = None

    @property
    def order(self) -> GradientOrder:
        return self.runs[0].order

    @property
    def inner_steps(self) -> int:
        return self.runs[0].inner_steps

    @property
    def setting(self) -> Setting:
        """The values of the varied keys."""
        return self.runs[0].varied

    @property
    def chosen(self) -> bool | None:
        """Whether its setting validated best; `None` if there was nothing to choose."""
        return None if self.choice is None else self.choice.is_chosen(self.setting)

    @property
    def is_outdone(self) -> bool:
        """Whether another setting was chosen, which represents its order."""
        return self.chosen is False

    @property
    def line(self) -> str:
        """What it shares with the rows that one line joins over inner steps or orders.

        The rows that are chosen are one line, and so are those that were the only ones; where nothing
        could be chosen, each setting is one.
        """
        return "" if self.choice is None or self.chosen else identity(self.setting)

    @property
    def validation(self) -> float | None:
        """The best validation result, averaged over the compared seeds; `None` if it is not compared."""
        return None if self.choice is None else self.choice.scores.get(identity(self.setting))

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
            "order": str(self.order),
            "inner_steps": self.inner_steps,
            "varied": self.setting,
            "chosen": self.chosen,
            "validation": finite(self.validation),
            "validation_seeds": None if self.choice is None else [*self.choice.seeds],
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

    If the runs of a trade-off say that a key is varied, they stay together, with a row for each value.

    Returns:
        The rows of each group, sorted by inner steps and order, the chosen one first, under its title:
        the experiment, and the settings that distinguish it from others of the same name.
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
        values = (f"{key} {own.get(key, config_value(run.config, key))}" for key in differing)
        groups.setdefault(", ".join((run.experiment, *values)), []).append(run)
    yield from groups.items()


def _split_repeats(runs: Iterable[Run]) -> list[list[Run]]:
    """Split runs with the same settings so that no group holds an order, inner steps and seed twice."""
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


def _rows(runs: Sequence[Run]) -> Iterator[ComparisonRow]:
    by_row: dict[tuple[int, GradientOrder], list[Run]] = {}
    for run in runs:
        by_row.setdefault((run.inner_steps, run.order), []).append(run)
    settings = varied_in(runs)
    if all(len(varied_in(same)) == 1 for same in by_row.values()):
        settings = settings[:1]  # as after a choice elsewhere: there is none to make here
    for inner_steps in sorted({steps for steps, _ in by_row}):
        first_order: list[ComparisonRow] = []
        orders = {order for steps, order in by_row if steps == inner_steps}
        for order in sorted(orders, key=lambda order: order.rank):  # the others need first order's rows
            rows = _rows_of_settings(by_row[inner_steps, order], settings, first_order)
            first_order = rows if order.first_order else first_order
            yield from rows


def _rows_of_settings(
    runs: Sequence[Run], settings: Sequence[Setting], first_order: list[ComparisonRow]
) -> list[ComparisonRow]:
    """Return a row for each setting of one order and number of inner steps, the chosen one first."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(identity(run.varied), []).append(run)
    choice = choose(runs, settings) if len(settings) > 1 else None
    own = varied_in(runs)
    if choice is not None:
        own.sort(key=lambda setting: not choice.is_chosen(setting))
    rows: list[ComparisonRow] = []
    for setting in own:
        known = first_order or [row for row in rows if row.order.first_order and row.chosen]
        same_runs = by_setting[identity(setting)]
        rows.append(ComparisonRow(same_runs, _reference(known, setting), choice))
    return rows


def _reference(first_order: Sequence[ComparisonRow], setting: Setting) -> ComparisonRow | None:
    """Return first order's chosen or only row; if it has none, the one with the same setting."""
    chosen = next((row for row in first_order if row.chosen or row.choice is None), None)
    same = (row for row in first_order if identity(row.setting) == identity(setting))
    return chosen or next(same, None)


def orders_in(rows: Iterable[ComparisonRow]) -> list[GradientOrder]:
    """Return the orders of some rows, from first to second order."""
    return sorted({row.order for row in rows}, key=lambda order: order.rank)


def lines(rows: Iterable[ComparisonRow]) -> list[list[ComparisonRow]]:
    """Group the rows of one order into lines over the inner steps, without those that are outdone."""
    found: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        if not row.is_outdone:
            found.setdefault(row.line, []).append(row)
    return [*found.values()]
