"""Plots are readable for any number of experiments, without colour and without overlapping labels."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from maml_pipeline.gradient_order import DEFAULT_ORDERS, GradientOrder, Method
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.curves import MOST_POINTS, series_over_seeds
from maml_pipeline.report.findings import findings
from maml_pipeline.report.gain import share_of_gain
from maml_pipeline.report.page import render_figure, write_report
from maml_pipeline.report.plots import draw_plots
from maml_pipeline.report.style import order_style, plain_number, plot_style
from maml_pipeline.report.table import table_columns
from maml_pipeline.report.tradeoff_plot import SCALE_COLOUR, draw_overview
from maml_pipeline.runs.run import Run
from tests.helpers import make_run

FIRST, SECOND, CHECKPOINTED = DEFAULT_ORDERS
TRUNCATED = [GradientOrder(differentiated_steps=n) for n in (1, 2)]
ORDERS = [
    *DEFAULT_ORDERS,
    GradientOrder(method=Method.HESSIAN_FREE),
    *(GradientOrder(differentiated_steps=n) for n in range(1, 9)),
]

# (order, inner steps): (result, half its interval, peak memory in MB), as measured.
TWENTY_WAY = {
    (FIRST, 1): (0.368, 0.006, 112.0),
    (SECOND, 1): (0.496, 0.007, 228.0),
    (CHECKPOINTED, 1): (0.495, 0.007, 190.0),
    (FIRST, 5): (0.533, 0.007, 112.1),
    (SECOND, 5): (0.689, 0.007, 695.0),
    (CHECKPOINTED, 5): (0.692, 0.007, 203.0),
}
FIVE_WAY = {
    (FIRST, 1): (0.859, 0.011, 74.1),
    (SECOND, 1): (0.909, 0.009, 147.0),
    (CHECKPOINTED, 1): (0.905, 0.009, 118.0),
    (FIRST, 3): (0.882, 0.009, 74.1),
    (SECOND, 3): (0.917, 0.009, 282.0),
    (CHECKPOINTED, 3): (0.907, 0.009, 130.0),
}
SINE = {
    (FIRST, 1): (0.165, 0.020, 0.434),
    (SECOND, 1): (0.154, 0.021, 0.660),
    (CHECKPOINTED, 1): (0.174, 0.029, 0.675),
    (FIRST, 2): (0.301, 0.030, 0.513),
    (SECOND, 2): (0.093, 0.013, 1.00),
    (CHECKPOINTED, 2): (0.096, 0.012, 0.853),
    (FIRST, 5): (0.295, 0.043, 0.513),
    (SECOND, 5): (0.079, 0.011, 1.81),
    (CHECKPOINTED, 5): (0.077, 0.011, 1.03),
}
# The worst case: every mark in one place.
COINCIDING = dict.fromkeys(SINE, (0.5, 0.1, 1.0))


def rows(
    results: dict[tuple[GradientOrder, int], tuple[float, float, float]],
    experiment: str = "sine",
    measure: str = "loss",
    seeds: Sequence[int] = (0,),
) -> list[ComparisonRow]:
    runs = [
        make_run(
            order,
            k,
            seed,
            result=result * (1 + 0.1 * seed),
            ci95=ci95,
            peak_bytes=1e6 * megabytes,
            experiment=experiment,
            measure=measure,
        )
        for (order, k), (result, ci95, megabytes) in results.items()
        for seed in seeds
    ]
    return next(iter(compare(runs).values()))


# All orders with one number of inner steps.
SCALE = {
    (FIRST, 5): (0.295, 0.043, 0.51),
    (TRUNCATED[0], 5): (0.21, 0.03, 0.9),
    (TRUNCATED[1], 5): (0.10, 0.02, 1.1),
    (SECOND, 5): (0.079, 0.011, 1.81),
    (CHECKPOINTED, 5): (0.077, 0.011, 1.03),
    (GradientOrder(method=Method.HESSIAN_FREE), 5): (0.081, 0.012, 0.8),
}

EXPERIMENTS = {
    "omniglot-20w1s": rows(TWENTY_WAY, "omniglot-20w1s", "accuracy"),
    "omniglot-5w1s": rows(FIVE_WAY, "omniglot-5w1s", "accuracy"),
    "sine-10shot": rows(SINE, "sine-10shot", "loss", seeds=(0, 1)),
    "coinciding": rows(COINCIDING),
    "scale": rows(SCALE, seeds=(0, 1)),
}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Labels -----------------------------------------------------------------------------------------


def draw(figure: Figure, dpi: float = 96) -> None:
    figure.set_dpi(dpi)
    with plot_style():
        FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]


def labels_of(ax: Axes) -> list[Annotation]:
    return [text for text in ax.texts if isinstance(text, Annotation)]


def label_boxes(ax: Axes) -> list[Bbox]:
    """Return the boxes of the labels in pixels, without the lines that join them to their marks."""
    return [Text.get_window_extent(label) for label in labels_of(ax)]


def overview_and_plots() -> list[Figure]:
    plots = [plot for shown in EXPERIMENTS.values() for plot in draw_plots(shown)]
    return [draw_overview(EXPERIMENTS), *(p.figure for p in plots if p.name.startswith("tradeoff"))]


@pytest.mark.parametrize("dpi", [96, 200])
def test_no_label_covers_another_or_leaves_its_panel(dpi: int) -> None:
    labels = 0
    for figure in overview_and_plots():
        draw(figure, dpi)
        for ax in figure.axes:
            boxes = label_boxes(ax)
            labels += len(boxes)
            for one, other in combinations(boxes, 2):
                assert not one.overlaps(other)
            panel = ax.get_window_extent()
            assert all(panel.contains(x, y) for box in boxes for x, y in (box.min, box.max))
    assert labels == 4 * (6 + 6 + 9 + 9 + 6)


def test_a_label_lies_beside_its_mark() -> None:
    figure = draw_overview({"20-way": EXPERIMENTS["omniglot-20w1s"]})
    draw(figure)
    ax, _ = figure.axes
    for box, label in zip(label_boxes(ax), labels_of(ax), strict=True):
        x, y = ax.transData.transform(label.xy)
        assert not box.contains(x, y)
        gap = max(box.x0 - x, x - box.x1, box.y0 - y, y - box.y1)
        assert gap < 30  # pixels


def test_the_same_rows_give_the_same_plot() -> None:
    one, other = (render_figure(draw_overview(EXPERIMENTS), "png") for _ in range(2))
    assert one == other


# Axes -------------------------------------------------------------------------------------------


def tick_labels(ax: Axes, which: str) -> list[str]:
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.05, "0.05"), (0.5, "0.5"), (2.5, "2.5"), (20, "20"), (500, "500")),
        *((999.9999999, "1,000"), (1000, "1,000"), (20_000, "20,000"), (1e9, "1e+09")),
    ],
)
def test_a_tick_is_a_plain_number(value: float, text: str) -> None:
    assert plain_number(value) == text


@pytest.mark.parametrize("unit", [1, 40, 700])
@pytest.mark.parametrize("spread", [1, 1.3, 8, 300])
def test_memory_ticks_are_few_plain_and_different(unit: float, spread: float) -> None:
    shown = rows({(FIRST, 1): (0.5, 0.1, unit), (SECOND, 1): (0.4, 0.1, unit * spread)})
    figure = draw_overview({"experiment": shown})
    draw(figure)
    ax, _ = figure.axes
    labels = tick_labels(ax, "x")
    assert 1 <= len(labels) <= 9 and len({*labels}) == len(labels)
    assert not any("e" in label for label in labels)
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def probe(step: int, cosine: float) -> dict[str, float]:
    return {"step": step - 1, "order_gap/cosine": cosine}


def test_a_single_probe_is_a_visible_mark_on_an_axis_with_different_ticks() -> None:
    runs = [make_run(order, 1, history=[probe(10, 0.9)]) for order in (FIRST, SECOND)]
    (shown,) = compare(runs).values()
    (plot,) = [plot for plot in draw_plots(shown) if plot.name == "order-gap-k1"]
    draw(plot.figure)
    (ax,) = plot.figure.axes
    labels = tick_labels(ax, "x")
    assert len({*labels}) == len(labels) >= 2
    for line in ax.lines:
        assert line.get_marker() not in ("", "None", None)
        ((x, y),) = np.asarray(line.get_xydata())
        assert ax.get_xlim()[0] < x <= ax.get_xlim()[1] and ax.get_ylim()[0] < y < ax.get_ylim()[1]


# From first to second order ----------------------------------------------------------------------


def test_thin_lines_join_the_truncated_orders_with_first_and_second_order() -> None:
    truncated = [GradientOrder(differentiated_steps=n) for n in (1, 3, 2)]
    others = [CHECKPOINTED, GradientOrder(differentiated_steps=1, method=Method.CHECKPOINTED)]
    megabytes = {FIRST: 1, SECOND: 9, **dict.fromkeys(others, 4)}
    megabytes |= {order: 2 + (order.differentiated_steps or 0) for order in truncated}
    shown = rows({(order, 4): (0.5, 0.1, peak) for order, peak in megabytes.items()})
    assert [str(row.order) for row in shown] == [
        *("first", "truncated-1", "truncated-2", "truncated-3", "second"),
        *("truncated-1-checkpointed", "checkpointed"),
    ]
    ax = draw_overview({"sine": shown}).axes[0]
    (scale,) = [line for line in ax.lines if line.get_color() == SCALE_COLOUR]
    assert [float(x) for x in np.asarray(scale.get_xdata())] == [1, 3, 4, 5, 9]
    without = draw_overview({"sine": rows(SINE)}).axes[0]
    assert not any(line.get_color() == SCALE_COLOUR for line in without.lines)


# Against memory and time ------------------------------------------------------------------------


def scale_lines(ax: Axes) -> list[tuple[list[float], list[float]]]:
    """Return the coordinates of the lines that belong to no order."""
    lines = [line for line in ax.lines if line.get_color() == SCALE_COLOUR]
    return [(np.asarray(x.get_xdata()).tolist(), np.asarray(x.get_ydata()).tolist()) for x in lines]


def test_the_overview_shows_memory_and_time_side_by_side_on_one_scale_of_results() -> None:
    memory, time = draw_overview({"sine": rows(SCALE)}).axes
    assert memory.get_xlabel() == "peak memory of a meta-step, MB"
    assert time.get_xlabel() == "time of a meta-step, ms"
    assert memory.get_ylim() == time.get_ylim()
    for ax, ends in ((memory, (0.51, 1.81)), (time, (5.1, 18.1))):
        (scale,) = [xs for xs, _ in scale_lines(ax) if len(xs) == 4]
        assert (scale[0], scale[-1]) == ends
    names = ["first", "truncated 1", "truncated 2", "second", "checkpointed", "hessian-free"]
    assert [text.get_text() for text in labels_of(time)] == names
    assert time.get_title(loc="left") == "k = 5"


def test_the_axis_on_the_right_is_the_share_of_second_orders_gain() -> None:
    figure = draw_overview({"sine": rows(SCALE)})
    draw(figure)
    memory, time = figure.axes
    assert not memory.child_axes
    (share,) = time.child_axes
    low, high = time.get_ylim()
    ends = [100 * (value - 0.295) / (0.079 - 0.295) for value in (low, high)]
    assert sorted(share.get_ylim()) == pytest.approx(sorted(ends))
    dotted = [ys for _, ys in scale_lines(time) if len({*ys}) == 1]
    assert sorted(ys[0] for ys in dotted) == [0.079, 0.295]
    several = draw_overview({"sine": EXPERIMENTS["sine-10shot"]}).axes
    assert not any(ax.child_axes for ax in several)


def test_a_share_needs_a_gain_beyond_the_confidence_intervals() -> None:
    shown = rows(SCALE)
    shares = {str(row.order): share_of_gain(row, shown) for row in shown}
    assert shares["first"] == 0 and shares["second"] == 1
    assert shares["truncated-1"] == pytest.approx((0.295 - 0.21) / (0.295 - 0.079))
    assert shares["checkpointed"] == pytest.approx((0.295 - 0.077) / (0.295 - 0.079))
    assert "(39 % of second order's gain)" in findings(shown)[0]
    (column,) = [c.cells for c in table_columns(shown) if c.group == "share of second order's gain"]
    assert column == ["0 %", "39 %", "90 %", "100 %", "101 %", "99 %"]
    for result, ci95 in ((0.27, 0.03), (0.4, 0.01)):  # too near, and worse than first order
        other = rows({**SCALE, (SECOND, 5): (result, ci95, 1.8)})
        assert {share_of_gain(row, other) for row in other} == {None}
        assert not any(ax.child_axes for ax in draw_overview({"sine": other}).axes)
    accuracy = rows(TWENTY_WAY, measure="accuracy")
    by_row = {(row.order, row.inner_steps): share_of_gain(row, accuracy) for row in accuracy}
    assert by_row[CHECKPOINTED, 1] == pytest.approx((0.495 - 0.368) / (0.496 - 0.368))
    assert by_row[CHECKPOINTED, 5] == pytest.approx((0.692 - 0.533) / (0.689 - 0.533))


def test_a_share_is_of_results_on_one_split() -> None:
    def only_validated(row: ComparisonRow, loss: float) -> None:
        history = [*row.runs[0].history, {"step": 99.0, "val/loss": loss, "val/loss_ci95": 0.01}]
        row.runs[:] = [replace(row.runs[0], test={}, history=history)]

    shown = rows(SCALE)
    (truncated,) = [row for row in shown if str(row.order) == "truncated-1"]
    (tested,) = truncated.runs
    only_validated(truncated, 0.05)
    assert truncated.split == "val" and share_of_gain(truncated, shown) is None
    for row in shown:
        if row is not truncated and row.result is not None:
            only_validated(row, row.result.mean)
    assert share_of_gain(truncated, shown) == pytest.approx((0.295 - 0.05) / (0.295 - 0.079))
    truncated.runs[:] = [tested]
    ax = draw_overview({"sine": shown}).axes[-1]
    assert not ax.child_axes, "first and second order are not on this axis"


def test_a_caption_tells_only_what_is_drawn() -> None:
    (scale,) = (plot.caption for plot in draw_plots(rows(SCALE)) if plot.name == "tradeoff")
    assert "a thin one leads from first over truncated to second order" in scale
    assert "single seeds" not in scale
    two = compare([make_run(FIRST, 1, seed, measure="R2_norm") for seed in (0, 1)])["sine"]
    (plot,) = (plot for plot in draw_plots(two) if plot.name == "tradeoff")
    assert "faint marks are single seeds" in plot.caption and "thin" not in plot.caption
    assert plot.title == "R2_norm against peak memory"
    assert plot.figure.axes[0].get_ylabel().startswith("test R2_norm")


def test_plots_of_different_experiments_have_different_files(tmp_path: Path) -> None:
    experiments = {name: rows(SCALE) for name in ("toy", "toy-tradeoff", "toy--tradeoff", "toy-")}
    expected = sum(len(draw_plots(shown)) for shown in experiments.values())
    write_report(experiments, tmp_path)
    assert len([*tmp_path.glob("*--*.png")]) == expected


def test_the_legend_of_all_orders_lies_inside_every_plot() -> None:
    for figure in (draw_overview({"sine": rows(SCALE)}), *(p.figure for p in draw_plots(rows(SCALE)))):
        draw(figure)
        (legend,) = figure.legends
        assert len(legend.get_texts()) == 6
        box, whole = legend.get_window_extent(), figure.bbox
        assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


# Without colour, and at any number of experiments -----------------------------------------------


def test_orders_differ_without_colour() -> None:
    styles = [order_style(order) for order in ORDERS]
    for one, other in combinations(styles, 2):
        assert one.marker != other.marker and one.line != other.line and one.label != other.label
    assert len({style.fill for style in styles[:2]}) == 2
    assert len({order_style(GradientOrder(differentiated_steps=n)).colour for n in (1, 2, 3)}) == 3


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9, 30])
def test_many_experiments_are_a_grid_of_readable_panels(number: int) -> None:
    titles = [f"experiment {n}, model.inner_lr 0.{n} and other settings" for n in range(number)]
    figure = draw_overview(dict.fromkeys(titles, EXPERIMENTS["sine-10shot"]))
    assert len(figure.axes) == 2 * number
    width, _ = figure.get_size_inches()
    assert width <= 11
    draw(figure)
    panels = [ax.get_tightbbox() for ax in figure.axes]
    assert all(not one.overlaps(other) for one, other in combinations(filter(None, panels), 2))
    assert all(ax.get_window_extent().width / figure.dpi > 1.8 for ax in figure.axes)


def test_every_text_of_a_plot_lies_inside_it() -> None:
    for shown in EXPERIMENTS.values():
        for plot in draw_plots(shown):
            draw(plot.figure)
            drawn = plot.figure.get_tightbbox()
            width, height = plot.figure.get_size_inches()
            assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


# Curves -----------------------------------------------------------------------------------------


def test_the_training_loss_is_drawn() -> None:
    history = [{"step": step, "train/loss": 1 / (1 + step)} for step in range(0, 50, 10)]
    (shown,) = compare([make_run(FIRST, 1, history=history)]).values()
    (plot,) = [plot for plot in draw_plots(shown) if plot.name == "training-loss-k1"]
    (line,) = plot.figure.axes[0].lines
    assert np.asarray(line.get_ydata()).tolist() == [record["train/loss"] for record in history]


def logged(run: Run, values: Sequence[float], every: int) -> Run:
    history = [{"step": every * (n + 1) - 1, "a": value} for n, value in enumerate(values)]
    return replace(run, history=history)


def test_a_short_series_is_drawn_as_it_was_logged() -> None:
    runs = [logged(make_run(FIRST, 1, seed), [1 + seed, 2 + seed], 5) for seed in (0, 2)]
    series = series_over_seeds(runs, "a")
    assert series == ([5, 10], [2, 3], [1, 2], [3, 4])


@pytest.mark.parametrize("length", [MOST_POINTS + 1, 1000, 12_345])
def test_a_long_series_is_averaged_over_equal_stretches(length: int) -> None:
    runs = [logged(make_run(FIRST, 1, seed), [seed + 1.0] * length, 10) for seed in (0, 1)]
    series = series_over_seeds(runs, "a")
    assert MOST_POINTS / 2 <= len(series.steps) <= MOST_POINTS
    assert series.means == pytest.approx([1.5] * len(series.steps))
    assert (min(series.lowest), max(series.highest)) == pytest.approx((1, 2))
    assert all(one < other for one, other in pairwise(series.steps))
    gaps = [other - one for one, other in pairwise(series.steps[:-1])]
    assert max(gaps) - min(gaps) <= 10  # one logged step more or less


def test_plots_are_named_by_what_they_show() -> None:
    names = [plot.name for plot in draw_plots(EXPERIMENTS["sine-10shot"])]
    assert names == [
        "tradeoff",
        "tradeoff-time",
        "memory",
        "time",
        *(f"adaptation-k{k}" for k in (1, 2, 5)),
    ]
    assert [k for k, _ in groupby(EXPERIMENTS["sine-10shot"], lambda row: row.inner_steps)] == [1, 2, 5]
