"""Place the labels of marks so that no label covers another."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""Pixels, `(N, 2)`."""

DISTANCES: tuple[float, ...] = (4, 7, 11, 16, 22, 30, 40, 52, 66)
"""Points from a mark to the edge of its label, the nearest first."""
ANGLES = np.deg2rad([45, 135, -45, -135, 90, -90, 0, 180, 22.5, 157.5, -22.5, -157.5, 67.5, 112.5])
SPACING = 1.5
"""Points between two labels, at least."""
LEADER_FROM = 11.0
"""Points from which a line joins a label to its mark."""


def add_label(ax: Axes, text: str, mark: tuple[float, float], colour: str) -> None:
    """Label a mark; `separate_labels` places the label once everything is drawn.

    Args:
        ax: The axes of the mark.
        text: The label.
        mark: In data coordinates.
        colour: Of the label and of the line that may join it to the mark.
    """
    label = ax.annotate(
        text,
        mark,
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        color=colour,
        va="center",
        ha="center",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2},
    )
    label.set_in_layout(False)


def separate_labels(figure: Figure) -> None:
    """Move every label beside its mark, off the other labels and, if possible, off marks and lines.

    Labels are placed one after another, from left to right, each where it covers the fewest marks and
    lines and lies nearest to its mark. The same plot gets the same places.

    Args:
        figure: Complete but for this; its layout is final afterwards.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72
    for ax in figure.axes:
        labels = [text for text in ax.texts if isinstance(text, Annotation)]
        marks = [(label, ax.transData.transform(label.xy)) for label in labels]
        drawn, inside = _drawn_points(ax), ax.get_window_extent(renderer)
        placed: list[Bbox] = []
        for label, mark in sorted(marks, key=lambda pair: (*pair[1], pair[0].get_text())):
            extent = Text.get_window_extent(label, renderer)
            box, distance = _best_box(mark, extent, drawn, placed, inside, pixels)
            placed.append(box)
            centre = (np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2 - mark) / pixels
            label.set_position((float(centre[0]), float(centre[1])))
            if label.arrow_patch is not None:
                label.arrow_patch.set_visible(distance >= LEADER_FROM)


def _best_box(
    mark: Points, extent: Bbox, drawn: Points, placed: list[Bbox], inside: Bbox, pixels: float
) -> tuple[Bbox, float]:
    """Return the box of the best place, and its distance from the mark in points."""
    size = np.array([extent.width, extent.height]) + SPACING * pixels
    distances = np.repeat(DISTANCES, len(ANGLES))
    directions = np.tile(np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), (len(DISTANCES), 1))
    low = mark + (size / 2 + distances[:, None] * pixels) * directions - size / 2
    high = low + size
    others = np.array([box.extents for box in placed]).reshape(-1, 4)
    overlaps = _count(low[:, None] <= others[:, 2:], high[:, None] >= others[:, :2])
    is_outside = ~np.all((low >= inside.min) & (high <= inside.max), axis=1)
    near = drawn[np.all((drawn > low.min(axis=0)) & (drawn < high.max(axis=0)), axis=1)]
    covered = _count(near > low[:, None], near < high[:, None])
    best = np.argmin(1e6 * overlaps + 1e4 * is_outside + covered + 0.8 * distances)
    return Bbox([low[best], high[best]]), float(distances[best])


def _count(above: NDArray[np.bool_], below: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Count, for each place, what is within both bounds in both coordinates, `(places, N, 2)` each."""
    counts: NDArray[np.intp] = np.count_nonzero(np.all(above & below, axis=2), axis=1)
    return counts


def _drawn_points(ax: Axes) -> Points:
    """Return the pixels of marks, lines and error bars, about two pixels apart along lines."""
    paths = [line.get_transform().transform(line.get_xydata()) for line in ax.lines]
    for collection in ax.collections:
        if isinstance(collection, LineCollection):
            paths += [ax.transData.transform(segment) for segment in collection.get_segments()]
    points = [np.empty((0, 2))]
    for path in paths:
        if path.size == 0:
            continue
        # Weighs a mark, of some pixels across, more than a line.
        points += [path + np.array([x, y]) for x in (-3, 0, 3) for y in (-3, 0, 3)]
        points += [
            np.linspace(start, end, 2 + int(np.abs(end - start).max() / 2))
            for start, end in pairwise(path)
            if np.all(np.isfinite([start, end]))
        ]
    return np.concatenate(points)
