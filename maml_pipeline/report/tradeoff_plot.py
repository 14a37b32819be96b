"""The trade-off itself: result against memory, of one experiment or of all of them side by side."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml_pipeline.gradient_order import Method
from maml_pipeline.report.comparison import ComparisonRow, lines, orders_in
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
from maml_pipeline.text import printable, shortened, wrapped
from maml_pipeline.varied import identity, short_names, value_text

COLUMNS = 3
"""Experiments side by side in the overview."""
PANEL = (3.1, 3.1)
"""Inches of one experiment in the overview."""
SCALE_COLOUR = "#999999"
"""Of the lines from first to second order."""


def draw_overview(experiments: dict[str, list[ComparisonRow]]) -> Figure:
    """Draw the result of every experiment against its peak memory, up to three side by side.

    Args:
        experiments: Rows by title, as `compare` returns them.
    """
    with plot_style():
        columns = min(COLUMNS, len(experiments))
        lines = math.ceil(len(experiments) / columns)
        figure = Figure((PANEL[0] * columns, PANEL[1] * lines + 0.4), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for ax, (title, rows) in zip(axes, experiments.items(), strict=False):
            draw_tradeoff(ax, rows)
            ax.set_title("\n".join(wrapped(text, 30) for text in (title, label_note(rows)) if text))
        for ax in axes[len(experiments) :]:
            ax.remove()
        add_legend(figure, "order; k is the number of inner steps in training")
        separate_labels(figure)
        return figure


def draw_tradeoff(ax: Axes, rows: Sequence[ComparisonRow]) -> None:
    """Draw the result against peak memory, one line per order; `separate_labels` places the labels.

    Settings that were not chosen are small faint marks. Where truncated orders were trained, thin lines
    lead from first to second order.
    """
    compared, (unit, unit_name) = _rows_with_results(rows), memory_unit(rows)
    points = {
        id(row): (peak / unit, drawable(result.mean), drawable(result.ci95))
        for row, result in compared
        if (peak := row.mean("peak_bytes")) and 0 < peak < LARGEST
    }
    for scale in _scales([row for row, _ in compared if id(row) in points]):
        peaks, means, _ = zip(*(points[id(row)] for row in scale), strict=True)
        ax.plot(peaks, means, color=SCALE_COLOUR, linewidth=0.9, zorder=1)
    for order in orders_in(rows):
        style = order_style(order)
        drawn = [row for row, _ in compared if row.order == order and id(row) in points]
        for row in drawn:
            if row.is_outdone:
                ax.plot(*points[id(row)][:2], **faint_mark(order))
        for line in lines(drawn):
            peaks, means, margins = zip(*(points[id(row)] for row in line), strict=True)
            ax.errorbar(peaks, means, margins, capsize=2, elinewidth=1, **line_style(order))
            for row in line:
                _draw_seeds(ax, row, unit)
                peak, value, _ = points[id(row)]
                # Where nothing was chosen, each setting has a line: only its last mark is labelled.
                if not math.isnan(value) and (row.choice is None or row.chosen or row is line[-1]):
                    add_label(ax, _label(row), (peak, value), style.colour)
    ax.margins(x=0.12, y=0.12)
    log_x_axis(ax)
    better = "higher" if rows[0].runs[0].higher_is_better else "lower"
    ax.set_xlabel(f"peak memory of a meta-step, {unit_name}")
    ax.set_ylabel(f"{result_label(rows).lower()}\n({better} is better)")


def _scales(rows: Sequence[ComparisonRow]) -> list[list[ComparisonRow]]:
    """Return, for each number of inner steps, the unrolled orders from first to second order.

    Numbers without a truncated order are left out, and so are settings that were not chosen.
    """
    scales: dict[tuple[int, str], list[ComparisonRow]] = {}
    for row in rows:
        if row.order.method is Method.UNROLLED and not row.is_outdone:
            own = "" if row.chosen else identity(row.setting)
            scales.setdefault((row.inner_steps, own), []).append(row)
    return [
        sorted(scale, key=lambda row: row.order.rank)
        for scale in scales.values()
        if any(row.order.differentiated_steps is not None for row in scale)
    ]


def _draw_seeds(ax: Axes, row: ComparisonRow, unit: float) -> None:
    """Draw a faint mark for each of several seeds."""
    style = order_style(row.order)
    for run in row.evaluated if len(row.evaluated) > 1 else []:
        if run.result is not None and run.peak_bytes is not None:
            mark = (drawable(run.peak_bytes / unit), drawable(run.result.mean))
            ax.plot(*mark, style.marker, color=style.colour, fillstyle=style.fill, alpha=0.4)


def _label(row: ComparisonRow) -> str:
    """Return the inner steps and, in brackets, the values of the varied keys: `k=1 (0.4)`."""
    values = ", ".join(value_text(value) for value in row.setting.values())
    return f"k={row.inner_steps}" + (f" ({shortened(values, 20)})" if values else "")


def label_note(rows: Sequence[ComparisonRow]) -> str:
    """Return what the brackets of the labels hold; empty if nothing is varied."""
    names = ", ".join(printable(name) for name in short_names(rows[0].setting).values())
    return f"in brackets: {shortened(names, 60)}" if names else ""


def has_tradeoff(rows: Sequence[ComparisonRow]) -> bool:
    """Return whether any row has both a result and a peak memory."""
    return any(
        (peak := row.mean("peak_bytes")) is not None and 0 < peak < LARGEST
        for row, _ in _rows_with_results(rows)
    )


def _rows_with_results(rows: Sequence[ComparisonRow]) -> list[tuple[ComparisonRow, Estimate]]:
    """Return the rows with a test result; before any test, those with a validation result."""
    split = "test" if any(row.split == "test" for row in rows) else "val"
    return [(row, row.result) for row in rows if row.result is not None and row.split == split]


def result_label(rows: Sequence[ComparisonRow]) -> str:
    """Return what the results are: "Test accuracy after 3 inner steps"."""
    run = rows[0].runs[0]
    split = "Test" if any(row.split == "test" for row in rows) else "Validation"
    name, step = run.measure_at_test
    last = max((len(run.test_curve) - 1 for row in rows for run in row.runs), default=-1)
    steps = last if step is None else step
    after = f" after {steps} inner step{'' if steps == 1 else 's'}" if steps >= 0 else ""
    return f"{split} {shortened(name, 40)}{after}"


def memory_unit(rows: Sequence[ComparisonRow]) -> tuple[float, str]:
    """Return the bytes and the name of the unit that suits the largest peak memory."""
    most = max((peak for row in rows if (peak := row.mean("peak_bytes")) is not None), default=0)
    return next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= s), (1, "B"))
