"""The plots of one experiment: its trade-off, its costs, its training and its adaptation."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml_pipeline.report.comparison import ComparisonRow, lines, orders_in
from maml_pipeline.report.curves import draw_adaptation, draw_series
from maml_pipeline.report.labels import separate_labels
from maml_pipeline.report.style import (
    HEIGHT,
    WIDTH,
    add_legend,
    drawable,
    faint_mark,
    line_style,
    plot_style,
)
from maml_pipeline.report.tradeoff_plot import (
    draw_tradeoff,
    has_tradeoff,
    label_note,
    memory_unit,
    result_label,
)
from maml_pipeline.text import shortened, with_capital


@dataclass(frozen=True)
class Plot:
    """A plot and its texts.

    Args:
        name: The name of its file, without the suffix.
        title: A few words.
        caption: What is drawn, in a sentence or two.
        figure: The drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def draw_plots(rows: Sequence[ComparisonRow]) -> list[Plot]:
    """Draw every plot for which something was logged.

    Args:
        rows: Those of one experiment, by inner steps and order.
    """
    with plot_style():
        return [*_tradeoff_and_costs(rows), *_training_and_adaptation(rows)]


def _tradeoff_and_costs(rows: Sequence[ComparisonRow]) -> Iterator[Plot]:
    """Draw what compares all numbers of inner steps."""
    for cost, name, meaning, suffix in (
        ("peak_bytes", "peak memory", "most memory that a meta-step adds", ""),
        ("meta_step_ms", "time", "median time of a meta-step", "-time"),
    ):
        if has_tradeoff(rows, cost):
            measure = shortened(rows[0].runs[0].measure, 40)
            drawn = "A line joins the numbers of inner steps k in training"
            if any(row.order.differentiated_steps is not None for row in rows):
                drawn += ", and a thin one leads from first over truncated to second order"
            if any(len(row.evaluated) > 1 for row in rows):
                drawn += "; faint marks are single seeds"
            yield _plot(
                f"tradeoff{suffix}",
                f"{with_capital(measure)} against {name}",
                f"{result_label(rows)}, with its 95 % confidence interval over tasks, against the "
                f"{meaning}. {drawn}." + _note(rows, "Small faint marks", label_note(rows)),
                partial(draw_tradeoff, rows=rows, cost=cost),
            )
    if any(row.mean("peak_bytes") for row in rows):
        unit, unit_name = memory_unit(rows)
        yield _plot(
            "memory",
            "Peak memory against inner steps",
            "The most memory that a meta-step adds to the parameters, their gradients and the state of "
            f"the optimizer.{_note(rows, 'Small faint marks')}",
            partial(
                _draw_cost, rows=rows, cost="peak_bytes", label=f"peak memory, {unit_name}", unit=unit
            ),
        )
    if any(row.mean("meta_step_ms") for row in rows):
        yield _plot(
            "time",
            "Time against inner steps",
            "The median time of a meta-step, without drawing its tasks, on the machine that trained."
            + _note(rows, "Small faint marks"),
            partial(_draw_cost, rows=rows, cost="meta_step_ms", label="time of a meta-step, ms"),
        )


def _training_and_adaptation(rows: Sequence[ComparisonRow]) -> Iterator[Plot]:
    """Draw, for each number of inner steps in training, how training went and how tasks adapt."""
    monitor = rows[0].runs[0].monitor
    monitor_name = shortened(monitor, 40)
    seeds = "the mean over seeds, and the range from the lowest to the highest"
    for k, same_steps in groupby(rows, lambda row: row.inner_steps):
        group = [*same_steps]
        runs = [run for row in group for run in row.runs]
        steps = f"{k} inner step{'' if k == 1 else 's'} in training"
        series = [
            (
                "training-loss",
                "Training loss",
                "train/loss",
                "training loss",
                f"Loss on the query sets of the training tasks after the inner steps: {seeds}. A long "
                "run is averaged over equal stretches of meta-steps.",
            ),
            (
                "validation",
                "Validation",
                monitor,
                monitor_name,
                f"{monitor_name} during training: {seeds}.",
            ),
            (
                "order-gap",
                "Cosine of the orders",
                "order_gap/cosine",
                "cosine of the orders",
                "Cosine between the first-order and the second-order meta-gradient of the same tasks at "
                "the same parameters, during the training with each order; 1 is the same direction.",
            ),
        ]
        for name, title, metric, label, caption in series:
            if any(run.series(metric) for run in runs):
                draw = partial(draw_series, rows=group, metric=metric, label=label)
                caption += _note(group, "Faint lines")
                yield _plot(f"{name}-k{k}", f"{title}, {steps}", caption, draw)
        if any(run.test_curve for run in runs):
            yield _plot(
                f"adaptation-k{k}",
                f"Adaptation at test, {steps}",
                "The measure on the test tasks before the first inner step and after each, with its "
                "95 % confidence interval over tasks; the vertical line: the inner steps in training."
                + _note(group, "Faint lines"),
                partial(draw_adaptation, rows=group),
            )


def _note(rows: Sequence[ComparisonRow], faint: str, brackets: str = "") -> str:
    """Return what a caption adds if keys are varied."""
    text = f" {with_capital(brackets)}." if brackets else ""
    outdone = any(row.is_outdone for row in rows)
    return text + (f" {faint}: settings that were not chosen by validation." if outdone else "")


def _plot(name: str, title: str, caption: str, draw: Callable[[Axes], None]) -> Plot:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    draw(figure.subplots())
    add_legend(figure)
    separate_labels(figure)
    return Plot(name, title, caption, figure)


def _draw_cost(ax: Axes, rows: Sequence[ComparisonRow], cost: str, label: str, unit: float = 1) -> None:
    most = 0.0
    for order in orders_in(rows):
        own = [row for row in rows if row.order == order]
        outdone = [row for row in own if row.is_outdone]
        styled = [(line, line_style(order)) for line in lines(own)] + [(outdone, faint_mark(order))]
        for line, style in styled:
            known = [(row.inner_steps, row.mean(cost)) for row in line]
            points = [(k, drawable(value / unit)) for k, value in known if value]
            if points:
                ax.plot(*zip(*points, strict=True), **style)
                most = max([most, *(value for _, value in points if not math.isnan(value))])
    ax.set_xticks(sorted({row.inner_steps for row in rows}))
    ax.set_ylim(0, 1.08 * most or 1)
    ax.set_xlabel("inner steps k in training")
    ax.set_ylabel(label)
