"""Columns: a convolution's input rearranged so that the convolution is a matrix product.

Images are channels-last matrices with a row for each pixel. Row r of the columns holds the input values
under the kernel at output pixel r, in the order (kernel row, kernel column, channel), and zeros outside
the image. A block's input is the output of the block before it, relu(scale (z - mean) + shift). It is
not kept: it is computed from z while columns are gathered.
"""

from typing import Any, NamedTuple

from maml_pipeline.meta_gradient.native.convnet.kernels import Kernel
from maml_pipeline.meta_gradient.native.convnet.normalisation import MEAN, SCALE, SHIFT
from maml_pipeline.meta_gradient.native.convnet.operands import (
    part,
    read_integer,
    read_matrix,
    zeros,
)
from maml_pipeline.meta_gradient.native.numba_internals import compiled


class Geometry(NamedTuple):
    """Sizes of a convolution, and the output pixel of the first row of columns: operands of kernels."""

    channels: int  # of the input
    kernel: int
    stride: int
    padding: int
    height: int  # of the input
    width: int
    out_height: int
    out_width: int
    first: int


@compiled
def geometry_of(operands: Any, index: int) -> Geometry:
    """Read a geometry from an operand and the next ones."""
    return Geometry(
        read_integer(operands, index),
        read_integer(operands, index + 1),
        read_integer(operands, index + 2),
        read_integer(operands, index + 3),
        read_integer(operands, index + 4),
        read_integer(operands, index + 5),
        read_integer(operands, index + 6),
        read_integer(operands, index + 7),
        read_integer(operands, index + 8),
    )


@compiled
def window(geometry: Any, row: int) -> tuple[int, int, int]:
    """Return the first pixel of a row's image, and the corner of the kernel in it."""
    pixel = geometry.first + row
    above, column = pixel // geometry.out_width, pixel % geometry.out_width
    image, line = above // geometry.out_height, above % geometry.out_height
    return (
        image * geometry.height * geometry.width,
        line * geometry.stride - geometry.padding,
        column * geometry.stride - geometry.padding,
    )


@Kernel
def gather_images(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the network's input. Operands: images, columns, geometry."""
    images, columns = read_matrix(arrays, operands, 0), read_matrix(arrays, operands, 1)
    g = geometry_of(operands, 2)
    run = g.kernel * g.channels
    for row in range(len(columns)):
        image, top, left = window(g, row)
        start, end = max(0, -left) * g.channels, min(g.kernel, g.width - left) * g.channels
        for i in range(g.kernel):
            target = part(columns, row * columns.shape[1] + i * run, run)
            for c in range(run):
                target[c] = 0
            if 0 <= top + i < g.height:
                pixels = part(images, (image + (top + i) * g.width + left) * g.channels, run)
                for c in range(start, end):
                    target[c] = pixels[c]


@Kernel
def gather(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the output of a block. Operands: its z or peaks, norm, columns, geometry."""
    z, norm = read_matrix(arrays, operands, 0), read_matrix(arrays, operands, 1)
    columns, g = read_matrix(arrays, operands, 2), geometry_of(operands, 3)
    run, zero = g.kernel * g.channels, columns.dtype.type(0)
    mean, scale, shift = zeros(run, z.dtype), zeros(run, z.dtype), zeros(run, z.dtype)
    for c in range(run):  # repeated, so that the loop below is a long one
        mean[c] = norm[MEAN, c % g.channels]
        scale[c] = norm[SCALE, c % g.channels]
        shift[c] = norm[SHIFT, c % g.channels]
    for row in range(len(columns)):
        image, top, left = window(g, row)
        start, end = max(0, -left), min(g.kernel, g.width - left)
        for i in range(g.kernel):
            target = part(columns, row * columns.shape[1] + i * run, run)
            if end - start < g.kernel or not 0 <= top + i < g.height:
                for c in range(run):
                    target[c] = 0
            if not 0 <= top + i < g.height:
                continue
            source = (image + (top + i) * g.width + left + start) * g.channels
            values = part(z, source, (end - start) * g.channels)
            inside = part(target, start * g.channels, len(values))
            for c in range(len(values)):
                y = scale[c] * (values[c] - mean[c]) + shift[c]
                inside[c] = y if y > zero else zero


@Kernel
def gather_tangents(arrays: Any, operands: Any, factor: float) -> None:
    """Gather columns of the tangents of a block's output.

    Operands: its z or peaks, their tangents, norm, norm_dot, columns, those of the tangents, geometry.
    """
    z, z_dot = read_matrix(arrays, operands, 0), read_matrix(arrays, operands, 1)
    norm, norm_dot = read_matrix(arrays, operands, 2), read_matrix(arrays, operands, 3)
    columns, tangents = read_matrix(arrays, operands, 4), read_matrix(arrays, operands, 5)
    g = geometry_of(operands, 6)
    run, zero = g.kernel * g.channels, columns.dtype.type(0)
    scale, scale_dot, constant = zeros(run, z.dtype), zeros(run, z.dtype), zeros(run, z.dtype)
    for c in range(run):
        channel = c % g.channels
        scale[c], scale_dot[c] = norm[SCALE, channel], norm_dot[SCALE, channel]
        constant[c] = norm_dot[SHIFT, channel]
        constant[c] -= scale_dot[c] * norm[MEAN, channel] + scale[c] * norm_dot[MEAN, channel]
    for row in range(len(columns)):
        image, top, left = window(g, row)
        start, end = max(0, -left), min(g.kernel, g.width - left)
        for i in range(g.kernel):
            at = row * columns.shape[1] + i * run
            target = part(tangents, at, run)
            if end - start < g.kernel or not 0 <= top + i < g.height:
                for c in range(run):
                    target[c] = 0
            if not 0 <= top + i < g.height:
                continue
            source = (image + (top + i) * g.width + left + start) * g.channels
            values = part(z, source, (end - start) * g.channels)
            values_dot = part(z_dot, source, len(values))
            inside = part(target, start * g.channels, len(values))
            y = part(columns, at + start * g.channels, len(values))
            for c in range(len(values)):
                y_dot = scale_dot[c] * values[c] + scale[c] * values_dot[c] + constant[c]
                inside[c] = y_dot if y[c] > zero else zero


@Kernel
def scatter(arrays: Any, operands: Any, factor: float) -> None:
    """Add the gradient by columns to that by the pixels that they were gathered from.

    Operands: gradient by columns, gradient by pixels, geometry.
    """
    columns, pixels = read_matrix(arrays, operands, 0), read_matrix(arrays, operands, 1)
    g = geometry_of(operands, 2)
    for row in range(len(columns)):
        image, top, left = window(g, row)
        start, end = max(0, -left), min(g.kernel, g.width - left)
        for i in range(max(0, -top), min(g.kernel, g.height - top)):
            at = row * columns.shape[1] + (i * g.kernel + start) * g.channels
            values = part(columns, at, (end - start) * g.channels)
            source = (image + (top + i) * g.width + left + start) * g.channels
            target = part(pixels, source, len(values))
            for c in range(len(values)):
                target[c] += values[c]
