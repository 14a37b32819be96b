"""Columns: a convolution's input rearranged so that the convolution is a matrix product.

Images are channels-last matrices with a row for each pixel. Row r of the columns holds the input values
under the kernel at output pixel r, in the order (kernel row, kernel column, channel), and zeros outside
the image. A block's input is the output of the block before it, relu(scale (z - mean) + shift). It is
not kept: it is computed from z while columns are gathered.
"""

from typing import Any

import numpy as np

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
def window(block: Any, row: int) -> tuple[int, int, int]:
    """Return the first pixel of an output pixel's image, and the corner of the kernel in it."""
    width, height = block[OUT_WIDTH], block[OUT_HEIGHT]
    above, column = row // width, row % width
    image, line = above // height, above % height
    return (
        image * block[HEIGHT] * block[WIDTH],
        line * block[STRIDE] - block[PADDING],
        column * block[STRIDE] - block[PADDING],
    )


@compiled
def span(block: Any, left: int) -> tuple[int, int]:
    """Return the columns of the kernel that lie within an image."""
    return max(0, -left), min(block[KERNEL], block[WIDTH] - left)


@compiled
def gather_images(block: Any, images: Any, first: int, columns: Any) -> None:
    """Gather columns of the network's input for output pixels `first`, `first` + 1, ...

    `images` is flat: pixel after pixel, the channels of each.
    """
    channels, kernel = block[CHANNELS], block[KERNEL]
    for row in range(len(columns)):
        image, top, left = window(block, first + row)
        start, end = span(block, left)
        fill(columns[row], 0)
        for i in range(max(0, -top), min(kernel, block[HEIGHT] - top)):
            source = (image + (top + i) * block[WIDTH] + left) * channels
            for at in range(start * channels, end * channels):
                columns[row, i * kernel * channels + at] = images[source + at]


@compiled
def gather(block: Any, z: Any, norm: Any, first: int, columns: Any) -> None:
    """Gather columns of a block's input; `norm` holds the statistics of the block before."""
    channels, kernel, zero = block[CHANNELS], block[KERNEL], columns.dtype.type(0)
    mean, scale = repeated(norm[MEAN], kernel), repeated(norm[SCALE], kernel)
    shift, pixels = repeated(norm[SHIFT], kernel), z.ravel()
    for row in range(len(columns)):
        image, top, left = window(block, first + row)
        start, end = span(block, left)
        for i in range(kernel):
            target = columns[row, i * kernel * channels : (i + 1) * kernel * channels]
            if top + i < 0 or top + i >= block[HEIGHT]:
                fill(target, 0)
                continue
            fill(target[: start * channels], 0)
            fill(target[end * channels :], 0)
            source = (image + (top + i) * block[WIDTH] + left + start) * channels
            values = pixels[source : source + (end - start) * channels]
            inside = target[start * channels :]
            for c in range(len(values)):
                y = scale[c] * (values[c] - mean[c]) + shift[c]
                inside[c] = y if y > zero else zero


@compiled
def gather_tangents(
    block: Any, z: Any, z_dot: Any, norm: Any, norm_dot: Any, columns: Any, first: int, tangents: Any
) -> None:
    """Gather columns of the tangent of a block's input; `columns` are those of the input."""
    channels, kernel, zero = block[CHANNELS], block[KERNEL], columns.dtype.type(0)
    scale, scale_dot = repeated(norm[SCALE], kernel), repeated(norm_dot[SCALE], kernel)
    constant = repeated(norm_dot[SHIFT], kernel)
    for c in range(len(constant)):
        constant[c] -= scale_dot[c] * norm[MEAN, c % channels] + scale[c] * norm_dot[MEAN, c % channels]
    pixels, pixels_dot = z.ravel(), z_dot.ravel()
    for row in range(len(columns)):
        image, top, left = window(block, first + row)
        start, end = span(block, left)
        for i in range(kernel):
            target = tangents[row, i * kernel * channels : (i + 1) * kernel * channels]
            if top + i < 0 or top + i >= block[HEIGHT]:
                fill(target, 0)
                continue
            fill(target[: start * channels], 0)
            fill(target[end * channels :], 0)
            source = (image + (top + i) * block[WIDTH] + left + start) * channels
            values = pixels[source : source + (end - start) * channels]
            values_dot = pixels_dot[source : source + len(values)]
            inside = target[start * channels :]
            y = columns[row, (i * kernel + start) * channels :]
            for c in range(len(values)):
                y_dot = scale_dot[c] * values[c] + scale[c] * values_dot[c] + constant[c]
                inside[c] = y_dot if y[c] > zero else zero


@compiled
def scatter(block: Any, columns: Any, first: int, gradient: Any) -> None:
    """Add the gradient of columns to that of the pixels that they were gathered from."""
    channels, kernel, pixels = block[CHANNELS], block[KERNEL], gradient.ravel()
    for row in range(len(columns)):
        image, top, left = window(block, first + row)
        start, end = span(block, left)
        for i in range(max(0, -top), min(kernel, block[HEIGHT] - top)):
            values = columns[row, (i * kernel + start) * channels : (i * kernel + end) * channels]
            source = (image + (top + i) * block[WIDTH] + left + start) * channels
            target = pixels[source : source + len(values)]
            for c in range(len(values)):
                target[c] += values[c]


@compiled
def repeated(vector: Any, times: int) -> Any:
    """Repeat a vector."""
    result = np.empty(times * len(vector), vector.dtype)
    for i in range(len(result)):
        result[i] = vector[i % len(vector)]
    return result
