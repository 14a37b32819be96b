"""From the last block's pixels to the input of the head, and back.

The pixels of an image are averaged, or follow each other in one row of the features. Then each pixel has
a *place* of its own among the features; averaged, all have the first one.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.operands import matrices


@Kernel
def feature_values(arrays: Any, operands: Any, factor: float) -> None:
    """Average the last block's output over the pixels of an image, or copy it. Operands: z, norm, x."""
    z, norm, x = matrices(arrays, operands, 3)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    filters, positions = z.shape[1], len(z) // len(x)
    places = x.shape[1] // filters
    share, zero = z.dtype.type(places / positions), z.dtype.type(0)
    for image in range(len(x)):
        for feature in range(x.shape[1]):
            x[image, feature] = 0
        for position in range(positions):
            row, start = image * positions + position, position % places * filters
            for c in range(filters):
                y = scale[c] * (z[row, c] - mean[c]) + shift[c]
                x[image, start + c] += (zero if y < zero else y) * share  # NaN stays


@Kernel
def feature_tangents(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the tangents of `feature_values`. Operands: z, z_dot, norm, norm_dot, x_dot."""
    z, z_dot, norm, norm_dot, x_dot = matrices(arrays, operands, 5)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    mean_dot, scale_dot, shift_dot = norm_dot[MEAN], norm_dot[SCALE], norm_dot[SHIFT]
    filters, positions = z.shape[1], len(z) // len(x_dot)
    places = x_dot.shape[1] // filters
    share, zero = z.dtype.type(places / positions), z.dtype.type(0)
    for image in range(len(x_dot)):
        for feature in range(x_dot.shape[1]):
            x_dot[image, feature] = 0
        for position in range(positions):
            row, start = image * positions + position, position % places * filters
            for c in range(filters):
                centred = z[row, c] - mean[c]
                y_dot = scale_dot[c] * centred + scale[c] * (z_dot[row, c] - mean_dot[c]) + shift_dot[c]
                is_cut = scale[c] * centred + shift[c] <= zero
                x_dot[image, start + c] += (zero if is_cut else y_dot) * share


@Kernel
def feature_gradient(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the gradient by the last block's output. Operands: gradient by the features, u."""
    features, u = matrices(arrays, operands, 2)
    filters, positions = u.shape[1], len(u) // len(features)
    places = features.shape[1] // filters
    share = u.dtype.type(places / positions)
    for image in range(len(features)):
        for position in range(positions):
            row, start = image * positions + position, position % places * filters
            for c in range(filters):
                u[row, c] = features[image, start + c] * share
