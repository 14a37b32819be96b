"""The report's pictures of one experiment."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml_pipeline.report.comparison import Row
from maml_pipeline.report.style import (
    COLOURS,
    HEIGHT,
    LABEL_OFFSETS,
    LABELS,
    MARKERS,
    WIDTH,
    plain_log_axis,
    style,
    thousands,
)
from maml_pipeline.runs.run import Estimate, Run, mean
from maml_pipeline.text import shortened, wrapped

COLUMNS = 4
"""Experiments beside each other in the overview."""

LARGEST = 1e100
"""A measure beyond it is that of a training that diverged; Matplotlib's arithmetic would overflow."""


@dataclass(frozen=True)
class Picture:
    """A figure and what it says.

    Args:
        name: Of its file, without the ending.
        title: In a few words.
        caption: What is drawn, in a sentence or two.
        figure: The drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def draw_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Draw every picture for which something was logged.

    Args:
        rows: Those of one experiment, by inner steps and order.
    """
    with style():
        return [picture for draw in (_costs, _by_inner_steps) for picture in draw(rows)]


def draw_overview(experiments: dict[str, list[Row]]) -> Figure:
    """Draw the measure against peak memory of every experiment, up to four in a line."""
    with style():
        columns = min(COLUMNS, len(experiments))
        lines = math.ceil(len(experiments) / columns)
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax, (experiment, rows) in zip(axes, experiments.items(), strict=False):
            draw_pareto(ax, rows)
            ax.set_title(wrapped(experiment, 50))
        for ax in axes[len(experiments) :]:
            ax.remove()
        _add_legend(figure)
        return figure


def _add_legend(figure: Figure) -> None:
    """Put the orders' names above all axes, where they hide nothing."""
    labelled: dict[str, Artist] = {}
    for ax in figure.axes:
        lines, labels = ax.get_legend_handles_labels()
        labelled |= dict(zip(labels, lines, strict=True))
    figure.legend([*labelled.values()], [*labelled], loc="outside upper left", ncols=len(labelled))


def _costs(rows: Sequence[Row]) -> Iterator[Picture]:
    """Draw what all numbers of inner steps share."""
    scale, unit = _memory_unit(rows)
    if any((peak := row.mean("peak_bytes")) and 0 < peak < LARGEST for row, _ in _official(rows)):
        yield _picture(
            "pareto",
            f"{_measure_name(rows).capitalize()} against peak memory",
            f"{measure_label(rows)}, with its 95 % confidence interval over tasks, against the most "
            "memory that a meta-step adds. A line joins the numbers of inner steps k in training; faint "
            "marks are single seeds.",
            partial(draw_pareto, rows=rows),
        )
    if any(row.mean("peak_bytes") for row in rows):
        yield _picture(
            "memory",
            "Peak memory against inner steps",
            "The most that a meta-step adds to parameters, gradients and the optimiser's state.",
            partial(
                _draw_cost, rows=rows, figure="peak_bytes", label=f"peak memory, {unit}", scale=scale
            ),
        )
    if any(row.mean("meta_step_ms") for row in rows):
        yield _picture(
            "time",
            "Time against inner steps",
            "The median time of a meta-step, without drawing its tasks, on the machine that trained.",
            partial(
                _draw_cost, rows=rows, figure="meta_step_ms", label="time of a meta-step, ms", scale=1
            ),
        )


def _by_inner_steps(rows: Sequence[Row]) -> Iterator[Picture]:
    """Draw, for each number of inner steps in training, how training went and how tasks adapt."""
    monitor = rows[0].runs[0].monitor
    label = shortened(monitor, 40)
    for k, same_steps in groupby(rows, lambda row: row.inner_steps):
        group = [*same_steps]
        runs = [run for row in group for run in row.runs]
        steps = f"{k} inner step{'' if k == 1 else 's'}"
        if any(run.series(monitor) for run in runs):
            yield _picture(
                f"learning-curve-k{k}",
                f"Validation, {steps} in training",
                f"{label} while training: the mean of the seeds, and from the lowest to the highest.",
                partial(_draw_series, rows=group, metric=monitor, label=label),
            )
        if any(run.series("order_gap/cosine") for run in runs):
            yield _picture(
                f"order-gap-k{k}",
                f"Order gap, {steps} in training",
                "Cosine between the first-order and the second-order meta-gradient of the same tasks at "
                "the same parameters, along the training of each order; 1 is the same direction.",
                partial(
                    _draw_series, rows=group, metric="order_gap/cosine", label="cosine of the two orders"
                ),
            )
        if any(run.test_curve for run in runs):
            yield _picture(
                f"adaptation-k{k}",
                f"Adaptation at test, {steps} in training",
                "The measure on the test tasks before the first inner step and after each, with its "
                "95 % confidence interval over tasks; the upright line: the inner steps of training.",
                partial(_draw_adaptation, rows=group),
            )


def _picture(name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Picture:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    draw(figure.subplots())
    _add_legend(figure)
    return Picture(name, title, caption, figure)


def _measure_name(rows: Sequence[Row]) -> str:
    return shortened(rows[0].runs[0].measure, 40)


def measure_label(rows: Sequence[Row]) -> str:
    """Name what the experiment is judged by: "Test accuracy after 3 inner steps"."""
    run = rows[0].runs[0]
    split = "Test" if any(row.split == "test" for row in rows) else "Validation"
    name, step = run.measure_at_test
    last = max((len(run.test_curve) - 1 for row in rows for run in row.runs), default=-1)
    steps = last if step is None else step
    after = f" after {steps} inner step{'' if steps == 1 else 's'}" if steps >= 0 else ""
    return f"{split} {shortened(name, 40)}{after}"


def _drawable(value: float) -> float:
    """Return a value, or NaN, which is not drawn, for what a training that diverged has logged."""
    return value if abs(value) < LARGEST else math.nan


def _memory_unit(rows: Sequence[Row]) -> tuple[float, str]:
    """Return the bytes and the name of the unit in which the largest peak memory is written."""
    most = max((peak for row in rows if (peak := row.mean("peak_bytes")) is not None), default=0)
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= s), (1, "B"))


def _official(rows: Sequence[Row]) -> list[tuple[Row, Estimate]]:
    """Return the rows with a result on the test tasks; before any, those on the validation tasks."""
    split = "test" if any(row.split == "test" for row in rows) else "val"
    return [(row, row.result) for row in rows if row.result is not None and row.split == split]


def draw_pareto(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the measure against peak memory, an order a line."""
    official, (scale, unit) = _official(rows), _memory_unit(rows)
    for order in COLOURS:
        known = [
            (row, result, row.mean("peak_bytes")) for row, result in official if row.method == order
        ]
        points = [
            (row, _drawable(result.mean), _drawable(result.ci95), peak / scale)
            for row, result, peak in known
            if peak is not None and 0 < peak < LARGEST
        ]
        if not points:
            continue
        colour = COLOURS[order]
        ax.errorbar(
            [peak for *_, peak in points],
            [value for _, value, _, _ in points],
            [margin for _, _, margin, _ in points],
            color=colour,
            marker=MARKERS[order],
            capsize=2,
            elinewidth=1,
            label=LABELS[order],
        )
        for row, value, _, peak in points:
            for run in row.measured if len(row.measured) > 1 else []:
                if run.result is not None and run.peak_bytes is not None:
                    mark = (_drawable(run.peak_bytes / scale), _drawable(run.result.mean))
                    ax.plot(*mark, MARKERS[order], color=colour, alpha=0.3)
            if math.isnan(value):
                continue
            ax.annotate(
                f"k={row.inner_steps}",
                (peak, value),
                textcoords="offset points",
                xytext=LABEL_OFFSETS[order],
                ha="left" if LABEL_OFFSETS[order][0] > 0 else "right",
                fontsize=8,
                color=colour,
            )
    plain_log_axis(ax, "x")
    ax.margins(x=0.15)
    run = rows[0].runs[0]
    ax.set_xlabel(f"peak memory of a meta-step, {unit}")
    better = "higher" if run.higher_is_better else "lower"
    ax.set_ylabel(f"{measure_label(rows).lower()}\n({better} is better)")


def _draw_cost(ax: Axes, rows: Sequence[Row], figure: str, label: str, scale: float) -> None:
    most = 0.0
    for order, group in _by_order(rows):
        points = [
            (row.inner_steps, _drawable(value / scale)) for row in group if (value := row.mean(figure))
        ]
        if points:
            line = ax.plot(*zip(*points, strict=True), color=COLOURS[order], marker=MARKERS[order])
            line[0].set_label(LABELS[order])
            most = max([most, *(value for _, value in points if not math.isnan(value))])
    ax.set_xticks(sorted({row.inner_steps for row in rows}))
    ax.set_ylim(0, 1.08 * most or 1)
    ax.set_xlabel("inner steps k in training")
    ax.set_ylabel(label)


def _draw_series(ax: Axes, rows: Sequence[Row], metric: str, label: str) -> None:
    for row in rows:
        steps, means, lowest, highest = _over_seeds(row.runs, metric)
        ax.plot(steps, means, color=COLOURS[row.method], label=LABELS[row.method])
        if len(row.runs) > 1:
            ax.fill_between(steps, lowest, highest, color=COLOURS[row.method], alpha=0.15, linewidth=0)
    thousands(ax)
    ax.set_xlabel("meta-steps")
    ax.set_ylabel(label)


def _over_seeds(
    runs: Iterable[Run], metric: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return where a metric was logged, and there its mean, least and greatest over the runs."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for step, value in run.series(metric):
            values.setdefault(step, []).append(_drawable(value))
    steps = sorted(values)
    return (
        steps,
        [mean(values[step]) for step in steps],
        [min(values[step]) for step in steps],
        [max(values[step]) for step in steps],
    )


def _draw_adaptation(ax: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        curves = [run.test_curve for run in row.runs if run.test_curve]
        if not curves:
            continue
        points = [*zip(*curves, strict=False)]
        means = [_drawable(mean([point.mean for point in seeds])) for seeds in points]
        margins = [_drawable(mean([point.ci95 for point in seeds])) for seeds in points]
        ax.errorbar(
            range(len(means)),
            means,
            margins,
            color=COLOURS[row.method],
            marker=MARKERS[row.method],
            markersize=4,
            capsize=2,
            elinewidth=1,
            label=LABELS[row.method],
        )
    ax.axvline(rows[0].inner_steps, color="#999999", linewidth=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.set_xlabel("inner steps at test")
    ax.set_ylabel(f"test {shortened(rows[0].runs[0].measure_at_test[0], 40)}")


def _by_order(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for order in COLOURS:
        group = [row for row in rows if row.method == order]
        if group:
            yield order, group
