"""Columns: a convolution's input rearranged so that the convolution is a matrix product.

Images are channels-last matrices with a row for each pixel. Row r of the columns holds the input values
under the kernel at output pixel r, in the order (kernel row, kernel column, channel), and zeros outside
the image. A block's input is the output of the block before it, relu(scale (z - mean) + shift). It is
not kept: it is computed from z while columns are gathered.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.layout import (
    CHANNELS,
    HEIGHT,
    KERNEL,
    OUT_HEIGHT,
    OUT_WIDTH,
    PADDING,
    STRIDE,
    WIDTH,
)
from maml_pipeline.meta_gradient.native.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.numba_internals import compiled
from maml_pipeline.meta_gradient.native.products import fill


@compiled
def input_row(block: Any, row: int, tap: int) -> int:
    """Return the input pixel under one tap of the kernel at an output pixel; -1 outside the image."""
    width = block[OUT_WIDTH]
    above, column = row // width, row % width
    image, line = above // block[OUT_HEIGHT], above % block[OUT_HEIGHT]
    i = line * block[STRIDE] - block[PADDING] + tap // block[KERNEL]
    j = column * block[STRIDE] - block[PADDING] + tap % block[KERNEL]
    if i < 0 or j < 0 or i >= block[HEIGHT] or j >= block[WIDTH]:
        return -1
    return (image * block[HEIGHT] + i) * block[WIDTH] + j  # type: ignore[no-any-return]


@compiled
def gather_images(block: Any, images: Any, first: int, columns: Any) -> None:
    """Gather columns of the network's input for output pixels `first`, `first` + 1, ..."""
    channels, zero = block[CHANNELS], columns.dtype.type(0)
    for row in range(len(columns)):
        for tap in range(block[KERNEL] * block[KERNEL]):
            source, start = input_row(block, first + row, tap), tap * channels
            for c in range(channels):
                columns[row, start + c] = images[source, c] if source >= 0 else zero


@compiled
def gather(block: Any, z: Any, norm: Any, first: int, columns: Any) -> None:
    """Gather columns of a block's input; `norm` holds the mean, scale and shift of the block before."""
    channels = block[CHANNELS]
    zero = columns.dtype.type(0)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    for row in range(len(columns)):
        for tap in range(block[KERNEL] * block[KERNEL]):
            source, start = input_row(block, first + row, tap), tap * channels
            target = columns[row, start : start + channels]
            if source < 0:
                fill(target, 0)
                continue
            values = z[source]
            for c in range(channels):
                y = scale[c] * (values[c] - mean[c]) + shift[c]
                target[c] = y if y > zero else zero


@compiled
def gather_tangents(
    block: Any, z: Any, z_dot: Any, norm: Any, norm_dot: Any, first: int, columns: Any, tangents: Any
) -> None:
    """Gather columns of a block's input and of its tangent."""
    channels = block[CHANNELS]
    zero = columns.dtype.type(0)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    mean_dot, scale_dot, shift_dot = norm_dot[MEAN], norm_dot[SCALE], norm_dot[SHIFT]
    for row in range(len(columns)):
        for tap in range(block[KERNEL] * block[KERNEL]):
            source, start = input_row(block, first + row, tap), tap * channels
            target = columns[row, start : start + channels]
            target_dot = tangents[row, start : start + channels]
            if source < 0:
                fill(target, 0)
                fill(target_dot, 0)
                continue
            values, values_dot = z[source], z_dot[source]
            for c in range(channels):
                centred = values[c] - mean[c]
                y = scale[c] * centred + shift[c]
                y_dot = scale_dot[c] * centred + scale[c] * (values_dot[c] - mean_dot[c]) + shift_dot[c]
                target[c] = y if y > zero else zero
                target_dot[c] = y_dot if y > zero else zero


@compiled
def scatter(block: Any, columns: Any, first: int, gradient: Any) -> None:
    """Add the gradient of columns to that of the pixels that they were gathered from."""
    channels = block[CHANNELS]
    for row in range(len(columns)):
        for tap in range(block[KERNEL] * block[KERNEL]):
            source, start = input_row(block, first + row, tap), tap * channels
            if source < 0:
                continue
            values = columns[row, start : start + channels]
            target = gradient[source]
            for c in range(channels):
                target[c] += values[c]
