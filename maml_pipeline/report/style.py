"""How plots look: one label, colour, marker and line style per order, the same in every plot."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from maml_pipeline.gradient_order import GradientOrder, Method


@dataclass(frozen=True)
class OrderStyle:
    """How a gradient order is labelled and drawn.

    Args:
        label: In the column `order` of tables and in the legends of plots.
        colour: One of Okabe and Ito's, "Color universal design", 2008, which every kind of colour
            vision tells apart. Without colour, marker and line style tell the orders apart.
        marker: Matplotlib's marker.
        fill: Matplotlib's fill style of the marker; hollow marks show those that they lie on.
        line: Matplotlib's line style.
    """

    label: str
    colour: str
    marker: str
    fill: Literal["full", "none"]
    line: str | tuple[float, tuple[float, ...]]


FIRST_ORDER = OrderStyle("first", "#0072B2", "o", "full", "-")
SECOND_ORDER = {
    Method.UNROLLED: OrderStyle("second", "#D55E00", "s", "none", "--"),
    Method.CHECKPOINTED: OrderStyle("second, checkpointed", "#009E73", "^", "none", ":"),
    Method.HESSIAN_FREE: OrderStyle("second, hessian-free", "#CC79A7", "D", "none", "-."),
}
TRUNCATED_COLOURS = {
    Method.UNROLLED: "#E69F00",
    Method.CHECKPOINTED: "#56B4E9",
    Method.HESSIAN_FREE: "#000000",
}
SHADES = (1.0, 0.65, 0.4)
"""Of the colour for n = 1, 2 and more: the more steps are differentiated, the darker."""
TRUNCATED_MARKERS = "v<>PXph*"
"""For n = 1, 2, ...; their lines are dashes with n dots in between."""

WIDTH, HEIGHT = 4.2, 3.2
"""Inches of one plot: at 96 pixels an inch it fits a phone without being scaled down."""

LEGEND_CHARACTER, LEGEND_HANDLE = 0.063, 0.55
"""Inches of a character of an entry of the legend, and of the rest of the entry."""

LARGEST = 1e100
"""A larger value is that of a diverged run; Matplotlib's arithmetic would overflow."""


@contextmanager
def plot_style() -> Iterator[None]:
    """Set fonts, lines and grid for the plots drawn inside, and nothing outside."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.title_fontsize": 8,
        "figure.dpi": 96,
        "savefig.dpi": 200,
        # Names may contain $, ^ and braces: none of the text is markup.
        "text.parse_math": False,
        "text.usetex": False,
        "svg.hashsalt": "maml_pipeline",  # the same plot is the same file
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes; the tables show them.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def order_style(order: GradientOrder) -> OrderStyle:
    """Return how an order is labelled and drawn."""
    if order.first_order:
        return FIRST_ORDER
    if (n := order.differentiated_steps) is None:
        return SECOND_ORDER[order.method]
    marker = TRUNCATED_MARKERS[(n - 1) % len(TRUNCATED_MARKERS)]
    dots = (1.0, 1.5) * min(n, 8)
    shade = SHADES[min(max(n, 1), len(SHADES)) - 1]
    red, green, blue = to_rgb(TRUNCATED_COLOURS[order.method])
    colour = to_hex((shade * red, shade * green, shade * blue))
    return OrderStyle(order.label, colour, marker, "none", (0, (5, 1.5, *dots)))


def line_style(order: GradientOrder) -> dict[str, Any]:
    """Return Matplotlib's keyword arguments for an order's line."""
    style = order_style(order)
    return {
        "label": style.label,
        "color": style.colour,
        "linestyle": style.line,
        "marker": style.marker,
        "fillstyle": style.fill,
    }


def faint_mark(order: GradientOrder) -> dict[str, Any]:
    """Return Matplotlib's keyword arguments for a mark of a setting that was not chosen."""
    return {**line_style(order), "linestyle": "none", "label": None, "alpha": 0.4, "markersize": 3}


def faint_line(order: GradientOrder) -> dict[str, Any]:
    """Return Matplotlib's keyword arguments for a curve of a setting that was not chosen."""
    return {**line_style(order), "marker": "", "label": None, "alpha": 0.35, "linewidth": 0.8}


def add_legend(figure: Figure, title: str = "order") -> None:
    """Name the orders above all axes, where the legend covers nothing, in as many lines as it needs."""
    labelled: dict[str, Artist] = {}
    for ax in figure.axes:
        lines, labels = ax.get_legend_handles_labels()
        labelled |= dict(zip(labels, lines, strict=True))
    columns = _legend_columns([*labelled], figure.get_figwidth())
    figure.legend(
        [*labelled.values()],
        [*labelled],
        loc="outside upper left",
        ncols=columns,
        title=title,
        alignment="left",
        handlelength=2.6,
    )


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many columns fit into a width in inches, each as wide as its longest label."""
    for columns in range(len(labels), 1, -1):
        parts = [part for part in np.array_split([*map(len, labels)], columns) if len(part)]
        if sum(part.max() * LEGEND_CHARACTER + LEGEND_HANDLE for part in parts) <= width:
            return columns
    return 1


def meta_step_axis(ax: Axes) -> None:
    """Start the x axis at meta-step 0, with whole numbers such as 10,000 far enough apart."""
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("meta-steps")


def log_x_axis(ax: Axes) -> None:
    """Make the x axis logarithmic, with labels such as 0.5, 1, 2, 500 and 1,000."""
    first, last = ax.dataLim.intervalx
    if 0 < first <= last < first * (1 + 1e-6):  # Matplotlib's limits would be equal, up to rounding
        ax.set_xlim(first / 1.5, last * 1.5)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [t for t in LogLocator(subs=steps).tick_values(low, high) if low <= t <= high]
        if len(ticks) >= 3:
            break
    else:
        ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(lambda value, _: plain_number(value))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def plain_number(value: float) -> str:
    """Return a tick's label without an exponent where that is short: 0.05, 2.5, 500, 1,000."""
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def drawable(value: float) -> float:
    """Return the value, or NaN, which is not drawn, in place of what a diverged run logged."""
    return value if abs(value) < LARGEST else math.nan
