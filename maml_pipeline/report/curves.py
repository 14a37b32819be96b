"""Curves of one number of inner steps: over the meta-steps of training, and over the steps at test."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.style import drawable, faint_line, line_style, meta_step_axis, order_style
from maml_pipeline.runs.run import Run, mean
from maml_pipeline.text import shortened

MOST_POINTS = 80
"""Points of a curve; a longer series is averaged over equal stretches of meta-steps."""


class Series(NamedTuple):
    """A metric over the meta-steps, and over seeds."""

    steps: list[float]
    means: list[float]
    lowest: list[float]
    highest: list[float]


def draw_series(ax: Axes, rows: Sequence[ComparisonRow], metric: str, label: str) -> None:
    """Draw a metric over the meta-steps, one line per row, with the range of its seeds.

    Settings that were not chosen are faint lines.
    """
    for row in rows:
        series = series_over_seeds(row.runs, metric)
        if not series.steps:
            continue
        if row.is_outdone:
            ax.plot(series.steps, series.means, **faint_line(row.order))
            continue
        every = max(1, math.ceil(len(series.steps) / 8))
        ax.plot(series.steps, series.means, markevery=every, markersize=4, **line_style(row.order))
        if len(row.runs) > 1:
            colour = order_style(row.order).colour
            ax.fill_between(
                series.steps, series.lowest, series.highest, color=colour, alpha=0.15, linewidth=0
            )
    meta_step_axis(ax)
    ax.set_ylabel(label)


def series_over_seeds(runs: Iterable[Run], metric: str) -> Series:
    """Return a metric's mean, minimum and maximum over runs, at no more than `MOST_POINTS` meta-steps.

    Args:
        runs: Runs that differ in their seed.
        metric: Its name in the log.
    """
    histories = [history for run in runs if (history := run.series(metric))]
    logged = {step for history in histories for step, _ in history}
    if not logged:
        return Series([], [], [], [])
    stretch = max(1, math.ceil(max(logged) / MOST_POINTS)) if len(logged) > MOST_POINTS else 1
    by_stretch: dict[int, dict[int, list[float]]] = {}
    steps: dict[int, list[int]] = {}
    for seed, history in enumerate(histories):
        for step, value in history:
            number = (step - 1) // stretch
            steps.setdefault(number, []).append(step)
            by_stretch.setdefault(number, {}).setdefault(seed, []).append(drawable(value))
    numbers = sorted(by_stretch)
    values = [[mean(seed) for seed in by_stretch[number].values()] for number in numbers]
    return Series(
        [mean(steps[number]) for number in numbers],
        [mean(seeds) for seeds in values],
        [min(seeds) for seeds in values],
        [max(seeds) for seeds in values],
    )


def draw_adaptation(ax: Axes, rows: Sequence[ComparisonRow]) -> None:
    """Draw the measure on the test tasks before the first inner step and after each."""
    for row in rows:
        curves = [run.test_curve for run in row.runs if run.test_curve]
        if not curves:
            continue
        points = [*zip(*curves, strict=False)]
        means = [drawable(mean([point.mean for point in seeds])) for seeds in points]
        margins = [drawable(mean([point.ci95 for point in seeds])) for seeds in points]
        if row.is_outdone:
            ax.plot(range(len(means)), means, **faint_line(row.order))
            continue
        style = line_style(row.order)
        ax.errorbar(range(len(means)), means, margins, markersize=4, capsize=2, elinewidth=1, **style)
    ax.axvline(rows[0].inner_steps, color="#999999", linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("inner steps at test")
    ax.set_ylabel(f"test {shortened(rows[0].runs[0].measure_at_test[0], 40)}")
