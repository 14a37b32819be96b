"""Columns: a convolution's input rearranged so that the convolution is a matrix product.

Images are channels-last matrices with a row for each pixel. Row r of the columns holds the input values
under the kernel at output pixel r, in the order (kernel row, kernel column, channel), and zeros outside
the image. A block's input is the output of the block before it, relu(scale (z - mean) + shift). It is
not kept: it is computed from z while columns are gathered.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.numba_internals import compiled
from maml_pipeline.meta_gradient.native.operands import integers, matrices, part, zeros

GEOMETRY = 9
"""Operands that describe a convolution, see `BlockLayout`, and the output pixel of the first row."""


@compiled
def window(geometry: Any, row: int) -> tuple[int, int, int, int, int]:
    """Return where a row of columns comes from.

    These are the first pixel of its image; the corner of the kernel in it; and the columns of the kernel
    that lie in the image, from the first one to that after the last.
    """
    _, kernel, stride, padding, height, width, out_height, out_width, first = geometry
    above, column = (first + row) // out_width, (first + row) % out_width
    image, line = above // out_height, above % out_height
    top, left = line * stride - padding, column * stride - padding
    start = -left if left < 0 else 0
    end = kernel if kernel < width - left else width - left
    return image * height * width, top, left, start, end


@Kernel
def gather_images(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the network's input. Operands: images, columns, geometry."""
    images, columns = matrices(arrays, operands, 2)
    geometry = integers(operands, 2, GEOMETRY)
    channels, kernel, _, _, height, width, _, _, _ = geometry
    run = kernel * channels
    for row in range(len(columns)):
        image, top, left, start, end = window(geometry, row)
        for i in range(kernel):
            target = part(columns, row * columns.shape[1] + i * run, run)
            for c in range(run):
                target[c] = 0
            if 0 <= top + i < height:
                pixels = part(images, (image + (top + i) * width + left) * channels, run)
                for c in range(start * channels, end * channels):
                    target[c] = pixels[c]


@Kernel
def gather(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the output of a block. Operands: its z or peaks, norm, columns, geometry."""
    z, norm, columns = matrices(arrays, operands, 3)
    geometry = integers(operands, 3, GEOMETRY)
    channels, kernel, _, _, height, width, _, _, _ = geometry
    run, zero = kernel * channels, columns.dtype.type(0)
    mean, scale, shift = zeros(run, z.dtype), zeros(run, z.dtype), zeros(run, z.dtype)
    for c in range(run):  # repeated, so that the innermost loop is a long one
        mean[c] = norm[MEAN, c % channels]
        scale[c] = norm[SCALE, c % channels]
        shift[c] = norm[SHIFT, c % channels]
    for row in range(len(columns)):
        image, top, left, start, end = window(geometry, row)
        for i in range(kernel):
            target = part(columns, row * columns.shape[1] + i * run, run)
            is_inside = 0 <= top + i < height
            if end - start < kernel or not is_inside:
                for c in range(run):
                    target[c] = 0
            if is_inside:
                source = (image + (top + i) * width + left + start) * channels
                values = part(z, source, (end - start) * channels)
                inside = part(target, start * channels, len(values))
                for c in range(len(values)):
                    y = scale[c] * (values[c] - mean[c]) + shift[c]
                    inside[c] = zero if y < zero else y  # NaN stays


@Kernel
def gather_tangents(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the tangents of a block's output.

    Operands: its z or peaks, their tangents, norm, norm_dot, columns, those of the tangents, geometry.
    """
    z, z_dot, norm, norm_dot, columns, tangents = matrices(arrays, operands, 6)
    geometry = integers(operands, 6, GEOMETRY)
    channels, kernel, _, _, height, width, _, _, _ = geometry
    run, zero = kernel * channels, columns.dtype.type(0)
    scale, scale_dot, constant = zeros(run, z.dtype), zeros(run, z.dtype), zeros(run, z.dtype)
    for c in range(run):
        channel = c % channels
        scale[c], scale_dot[c] = norm[SCALE, channel], norm_dot[SCALE, channel]
        constant[c] = norm_dot[SHIFT, channel]
        constant[c] -= scale_dot[c] * norm[MEAN, channel] + scale[c] * norm_dot[MEAN, channel]
    for row in range(len(columns)):
        image, top, left, start, end = window(geometry, row)
        for i in range(kernel):
            at = row * columns.shape[1] + i * run
            target = part(tangents, at, run)
            is_inside = 0 <= top + i < height
            if end - start < kernel or not is_inside:
                for c in range(run):
                    target[c] = 0
            if is_inside:
                source = (image + (top + i) * width + left + start) * channels
                values = part(z, source, (end - start) * channels)
                values_dot = part(z_dot, source, len(values))
                inside = part(target, start * channels, len(values))
                y = part(columns, at + start * channels, len(values))
                for c in range(len(values)):
                    y_dot = scale_dot[c] * values[c] + scale[c] * values_dot[c] + constant[c]
                    inside[c] = zero if y[c] <= zero else y_dot


@Kernel
def scatter(arrays: Any, operands: Any, factor: float) -> None:
    """Add the gradient by columns to that by the pixels that they were gathered from.

    Operands: gradient by columns, gradient by pixels, geometry.
    """
    columns, pixels = matrices(arrays, operands, 2)
    geometry = integers(operands, 2, GEOMETRY)
    channels, kernel, _, _, height, width, _, _, _ = geometry
    for row in range(len(columns)):
        image, top, left, start, end = window(geometry, row)
        for i in range(kernel):
            if 0 <= top + i < height:
                at = row * columns.shape[1] + (i * kernel + start) * channels
                values = part(columns, at, (end - start) * channels)
                source = (image + (top + i) * width + left + start) * channels
                target = part(pixels, source, len(values))
                for c in range(len(values)):
                    target[c] += values[c]
