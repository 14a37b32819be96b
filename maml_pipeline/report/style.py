"""How the report's pictures look: one colour and one marker an order, whatever the picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito, "Color universal design", 2008: told apart by every kind of colour vision.
COLOURS = {"first": "#0072B2", "second": "#D55E00", "checkpointed": "#009E73"}
MARKERS = {"first": "o", "second": "s", "checkpointed": "^"}
LABELS = {
    "first": "first order",
    "second": "second order",
    "checkpointed": "second, checkpointed",
}

LABEL_OFFSETS = {"first": (-6, 5), "second": (6, 5), "checkpointed": (6, -11)}
"""Points from a mark to its label: those of orders that do alike do not cover each other."""

WIDTH, HEIGHT = 4.2, 3.2
"""Inches: at 96 pixels each a picture fits a phone without being made smaller."""


@contextmanager
def style() -> Iterator[None]:
    """Set fonts, lines and grid for the pictures drawn inside, and nothing outside."""
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
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.dpi": 96,
        "savefig.dpi": 200,
        # Names may hold $, ^ and braces: none of the text is markup.
        "text.parse_math": False,
        "text.usetex": False,
        "svg.hashsalt": "maml_pipeline",  # the same picture is the same file
    }
    with mpl.rc_context(settings):
        yield


def thousands(ax: Axes) -> None:
    """Write meta-steps as 10,000, and not so many of them that they touch."""
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def plain_log_axis(ax: Axes, which: str) -> None:
    """Make an axis logarithmic, labelled 1, 2, 5, 10 and not by powers."""
    if which == "x":
        ax.set_xscale("log")
    else:
        ax.set_yscale("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    axis.set_minor_formatter(NullFormatter())
