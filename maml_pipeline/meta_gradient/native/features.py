"""From the last block's pixels to the input of the first fully connected layer, and back."""

from typing import Any

from maml_pipeline.meta_gradient.native.layout import FILTERS, INPUTS
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.numba_internals import compiled
from maml_pipeline.meta_gradient.native.products import fill


@compiled
def feature_values(layout: Any, z: Any, norm: Any, x: Any) -> None:
    """Average the last block's output over the pixels of an image, or copy it."""
    filters = layout.blocks[-1, FILTERS]
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    fill(x.ravel(), 0)
    for row in range(len(z)):
        image, position = row // layout.positions, row % layout.positions
        start = 0 if layout.averages else position * filters
        share = 1 / layout.positions if layout.averages else 1.0
        for c in range(filters):
            y = scale[c] * (z[row, c] - mean[c]) + shift[c]
            x[image, start + c] += (y if y > 0 else 0) * share


@compiled
def feature_tangents(layout: Any, z: Any, z_dot: Any, norm: Any, norm_dot: Any, x_dot: Any) -> None:
    """Compute the tangents of `feature_values`."""
    filters = layout.blocks[-1, FILTERS]
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    mean_dot, scale_dot, shift_dot = norm_dot[MEAN], norm_dot[SCALE], norm_dot[SHIFT]
    fill(x_dot.ravel(), 0)
    for row in range(len(z)):
        image, position = row // layout.positions, row % layout.positions
        start = 0 if layout.averages else position * filters
        share = 1 / layout.positions if layout.averages else 1.0
        for c in range(filters):
            centred = z[row, c] - mean[c]
            y_dot = scale_dot[c] * centred + scale[c] * (z_dot[row, c] - mean_dot[c]) + shift_dot[c]
            is_positive = scale[c] * centred + shift[c] > 0
            x_dot[image, start + c] += (y_dot if is_positive else 0) * share


@compiled
def feature_gradient(layout: Any, x_gradient: Any, u: Any) -> None:
    """Compute the gradient by the last block's output from that by the features, a flat array."""
    inputs = layout.dense[0, INPUTS]
    filters = layout.blocks[-1, FILTERS]
    for row in range(len(u)):
        image, position = row // layout.positions, row % layout.positions
        start = 0 if layout.averages else position * filters
        share = 1 / layout.positions if layout.averages else 1.0
        for c in range(filters):
            u[row, c] = x_gradient[image * inputs + start + c] * share
