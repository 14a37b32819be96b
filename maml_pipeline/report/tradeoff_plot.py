"""The trade-off itself: result against memory and time, of one experiment or of all of them."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml_pipeline.gradient_order import Method
from maml_pipeline.report.comparison import ComparisonRow, lines, orders_in
from maml_pipeline.report.gain import gain
from maml_pipeline.report.labels import add_label, separate_labels
from maml_pipeline.report.style import (
    LARGEST,
    add_legend,
    drawable,
    faint_mark,
    line_style,
    log_x_axis,
    order_style,
    plot_style,
)
from maml_pipeline.runs.run import Estimate
from maml_pipeline.text import printable, shortened, with_small_initial, wrapped
from maml_pipeline.varied import short_names, value_text

COSTS = ("peak_bytes", "meta_step_ms")
"""What a result is drawn against, side by side in the overview."""
PANEL = (3.9, 2.9)
"""Inches of one panel in the overview: two of them are as wide as the text of a README."""
SCALE_COLOUR = "#999999"
"""Of the lines from first to second order."""


def draw_overview(experiments: dict[str, list[ComparisonRow]]) -> Figure:
    """Draw the result of every experiment against its peak memory and its time, one below the other.

    Args:
        experiments: Rows by title, as `compare` returns them.
    """
    with plot_style():
        costs = [c for c in COSTS if any(has_tradeoff(rows, c) for rows in experiments.values())]
        costs = costs or [*COSTS[:1]]
        size = (PANEL[0] * len(costs) + 0.4, PANEL[1] * len(experiments) + 0.5)
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(experiments), len(costs), squeeze=False, sharey="row")
        for axes, (title, rows) in zip(grid, experiments.items(), strict=True):
            for ax, cost in zip(axes, costs, strict=True):
                draw_tradeoff(ax, rows, cost, with_gain=ax is axes[-1])
            notes = "; ".join(filter(None, (steps_note(rows), label_note(rows))))
            for ax, text in zip((axes[0], axes[-1]), (title, notes), strict=True):
                above = [ax.get_title(loc="left"), wrapped(text, 36)]
                ax.set_title("\n".join(filter(None, above)))
            for ax in axes[1:]:
                ax.set_ylabel("")
            for ax, cost in zip(axes[1:], costs[1:], strict=True):
                if not has_tradeoff(rows, cost):
                    ax.remove()
        add_legend(figure, "order; k is the number of inner steps in training")
        separate_labels(figure)
        return figure


def draw_tradeoff(
    ax: Axes, rows: Sequence[ComparisonRow], cost: str = COSTS[0], with_gain: bool = True
) -> None:
    """Draw the result against a cost, one line per order; `separate_labels` places the labels.

    Settings that were not chosen are small faint marks. Where truncated orders were trained, thin lines
    lead from first to second order. With one number of inner steps, dotted lines mark both orders, and
    an axis on the right tells the share of the gain from one to the other.

    Args:
        ax: Where to draw.
        rows: Those of one experiment.
        cost: One of `COSTS`.
        with_gain: Whether to draw the axis on the right.
    """
    compared, (unit, unit_name) = _rows_with_results(rows), _unit(rows, cost)
    points = {
        id(row): (value / unit, drawable(result.mean), drawable(result.ci95))
        for row, result in compared
        if (value := row.mean(cost)) and 0 < value < LARGEST
    }
    for scale in _scales([row for row, _ in compared if id(row) in points]):
        costs, means, _ = zip(*(points[id(row)] for row in scale), strict=True)
        ax.plot(costs, means, color=SCALE_COLOUR, linewidth=0.9, zorder=1)
    label = partial(_label, by_order=len({row.inner_steps for row in rows}) == 1)
    for order in orders_in(rows):
        style = order_style(order)
        drawn = [row for row, _ in compared if row.order == order and id(row) in points]
        for row in drawn:
            if row.is_outdone:
                ax.plot(*points[id(row)][:2], **faint_mark(order))
        for line in lines(drawn):
            costs, means, margins = zip(*(points[id(row)] for row in line), strict=True)
            ax.errorbar(costs, means, margins, capsize=2, elinewidth=1, **line_style(order))
            for row in line:
                _draw_seeds(ax, row, cost, unit)
                place, value, _ = points[id(row)]
                # Where nothing was chosen, each setting has a line: only its last mark is labelled.
                if not math.isnan(value) and (row.choice is None or row.chosen or row is line[-1]):
                    add_label(ax, label(row), (place, value), style.colour)
    ax.margins(x=0.15, y=0.12)
    log_x_axis(ax)
    better = "higher" if rows[0].runs[0].higher_is_better else "lower"
    name = {"peak_bytes": "peak memory", "meta_step_ms": "time"}[cost]
    ax.set_xlabel(f"{name} of a meta-step, {unit_name}")
    ax.set_ylabel(f"{with_small_initial(result_label(rows))}\n({better} is better)")
    _draw_gain(ax, rows, with_gain)


def _draw_gain(ax: Axes, rows: Sequence[ComparisonRow], with_axis: bool) -> None:
    """Mark the results of first and second order, and the share of the gain on an axis on the right."""
    steps = {row.inner_steps for row in rows}
    known = gain(rows, min(steps)) if len(steps) == 1 else None
    if known is None or known.split != _split_shown(rows):
        return
    first, second = known.first, known.second
    for value in (first, second):
        ax.axhline(value, color=SCALE_COLOUR, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    if not with_axis:
        return

    def to_percent(value: Any) -> Any:
        return 100 * (value - first) / (second - first)

    def from_percent(percent: Any) -> Any:
        return first + percent / 100 * (second - first)

    share = ax.secondary_yaxis("right", functions=(to_percent, from_percent))
    share.set_ylabel("share of second order's gain, %")


def _scales(rows: Sequence[ComparisonRow]) -> list[list[ComparisonRow]]:
    """Return, for each number of inner steps, the unrolled orders from first to second order.

    Numbers without a truncated order are left out, and so are settings that were not chosen.
    """
    scales: dict[tuple[int, str], list[ComparisonRow]] = {}
    for row in rows:
        if row.order.method is Method.UNROLLED and not row.is_outdone:
            scales.setdefault((row.inner_steps, row.line), []).append(row)
    return [
        sorted(scale, key=lambda row: row.order.rank)
        for scale in scales.values()
        if any(row.order.differentiated_steps is not None for row in scale)
    ]


def _draw_seeds(ax: Axes, row: ComparisonRow, cost: str, unit: float) -> None:
    """Draw a faint mark for each of several seeds."""
    style = order_style(row.order)
    for run in row.evaluated if len(row.evaluated) > 1 else []:
        value = getattr(run, cost)
        if run.result is not None and value:
            mark = (drawable(value / unit), drawable(run.result.mean))
            ax.plot(*mark, style.marker, color=style.colour, fillstyle=style.fill, alpha=0.4)


def _label(row: ComparisonRow, by_order: bool) -> str:
    """Return the inner steps or the order, and in brackets the values of varied keys: `k=1 (0.4)`."""
    values = ", ".join(value_text(value) for value in row.setting.values())
    name = row.order.short_label if by_order else f"k={row.inner_steps}"
    return name + (f" ({shortened(values, 20)})" if values else "")


def steps_note(rows: Sequence[ComparisonRow]) -> str:
    """Return the inner steps in training, if the labels do not tell them."""
    steps = {row.inner_steps for row in rows}
    return f"k = {min(steps)}" if len(steps) == 1 else ""


def label_note(rows: Sequence[ComparisonRow]) -> str:
    """Return what the brackets of the labels hold; empty if nothing is varied."""
    names = ", ".join(printable(name) for name in short_names(rows[0].setting).values())
    return f"in brackets: {shortened(names, 60)}" if names else ""


def has_tradeoff(rows: Sequence[ComparisonRow], cost: str = COSTS[0]) -> bool:
    """Return whether any row has both a result and a cost."""
    return any(
        (value := row.mean(cost)) is not None and 0 < value < LARGEST
        for row, _ in _rows_with_results(rows)
    )


def _rows_with_results(rows: Sequence[ComparisonRow]) -> list[tuple[ComparisonRow, Estimate]]:
    """Return the rows with a test result; before any test, those with a validation result."""
    split = _split_shown(rows)
    return [(row, row.result) for row in rows if row.result is not None and row.split == split]


def _split_shown(rows: Sequence[ComparisonRow]) -> str:
    return "test" if any(row.split == "test" for row in rows) else "val"


def result_label(rows: Sequence[ComparisonRow]) -> str:
    """Return what the results are: "Test accuracy after 3 inner steps"."""
    run = rows[0].runs[0]
    split = {"test": "Test", "val": "Validation"}[_split_shown(rows)]
    name, step = run.measure_at_test
    last = max((len(run.test_curve) - 1 for row in rows for run in row.runs), default=-1)
    steps = last if step is None else step
    after = f" after {steps} inner step{'' if steps == 1 else 's'}" if steps >= 0 else ""
    return f"{split} {shortened(name, 40)}{after}"


def _unit(rows: Sequence[ComparisonRow], cost: str) -> tuple[float, str]:
    """Return the size and the name of the unit of a cost, in that of `Run`'s property."""
    return memory_unit(rows) if cost == "peak_bytes" else (1, "ms")


def memory_unit(rows: Sequence[ComparisonRow]) -> tuple[float, str]:
    """Return the bytes and the name of the unit that suits the largest peak memory."""
    most = max((peak for row in rows if (peak := row.mean("peak_bytes")) is not None), default=0)
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= s), (1, "B"))
