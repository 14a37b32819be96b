"""Batch normalisation and ReLU: values, gradients and tangents of both, in closed form.

With the centred input c = z - mean, the inverse deviation r and M pixels, a block's output is

    y = relu(s c + b),   s = g r,   r = (mean(c^2) + eps)^(-1/2),

where g and b are the normalisation's parameters. Let u be the gradient by y where y > 0, else 0. Then

    d/db = sum u,   d/dg = r t with t = sum u c,   d/dz = s (u - (sum u) / M - p c) with p = r^2 t / M.

A prime marks the tangent of a quantity: its derivative in a given direction. Tangents of the gradients,
which make up a Hessian-vector product, follow from the rules of calculus:

    r' = -r^3 mean(c z'),   s' = g' r + g r',   y' = s' c + s c' + b' where y > 0,
    t' = sum (u' c + u c'),   (d/dg)' = r' t + r t',   p' = (2 r r' t + r^2 t') / M,
    (d/dz)' = s' (u - (sum u) / M - p c) + s (u' - (sum u') / M - p c' - p' c).

Row by row, `norm` holds the mean, s, b, r, sum u and t, and `norm_dot` their tangents. If the block
pools, u is nonzero only at the winners (`pooling.py`): it is kept for these alone, and its terms of d/dz
are added there.

References:
    Ioffe, Szegedy, "Batch Normalization", 2015, algorithm 1 and section 3; Pearlmutter, "Fast Exact
    Multiplication by the Hessian", 1994 (tangents of gradients).
"""

from typing import Any

import numpy as np

from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.operands import matrices, number, zeros

MEAN, SCALE, SHIFT, DEVIATION, SUM, DOT = range(6)
"""Rows of `norm`: the mean, s, b, r, sum u and t above."""

NORM_ROWS = 6
ROWS = 64  # summed in the networks' own precision before they are added to sums in float64


@Kernel
def statistics(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the mean, s, b and r of the channels. Operands: z, gain, bias, norm, eps."""
    z, gain, bias, norm = matrices(arrays, operands, 4)
    eps = number(operands, 4)
    pixels, channels = z.shape
    total, part = zeros(channels, np.float64), zeros(channels, z.dtype)
    mean, scale, shift, deviation = norm[MEAN], norm[SCALE], norm[SHIFT], norm[DEVIATION]
    for start in range(0, pixels, ROWS):
        for c in range(channels):
            part[c] = 0
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                part[c] += z[row, c]
        for c in range(channels):
            total[c] += part[c]
    for c in range(channels):
        mean[c] = total[c] / pixels
        total[c] = 0
    for start in range(0, pixels, ROWS):
        for c in range(channels):
            part[c] = 0
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                centred = z[row, c] - mean[c]
                part[c] += centred * centred
        for c in range(channels):
            total[c] += part[c]
    for c in range(channels):
        deviation[c] = 1 / np.sqrt(total[c] / pixels + eps)
        scale[c] = gain[0, c] * deviation[c]
        shift[c] = bias[0, c]


@Kernel
def mask_and_sum(arrays: Any, operands: Any, factor: float) -> None:
    """Set u to 0 where y = 0, and compute its sums, and its dot products with c, over pixels.

    Operands: z, u, norm, and the matrix whose rows SUM and DOT receive the sums.
    """
    z, u, norm, out = matrices(arrays, operands, 4)
    pixels, channels = z.shape
    totals, products, zero = zeros(channels, np.float64), zeros(channels, np.float64), z.dtype.type(0)
    part, part_dot = zeros(channels, z.dtype), zeros(channels, z.dtype)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    for start in range(0, pixels, ROWS):
        for c in range(channels):
            part[c] = 0
            part_dot[c] = 0
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                centred = z[row, c] - mean[c]
                value = zero if scale[c] * centred + shift[c] <= zero else u[row, c]
                u[row, c] = value
                part[c] += value
                part_dot[c] += value * centred
        for c in range(channels):
            totals[c] += part[c]
            products[c] += part_dot[c]
    for c in range(channels):
        out[SUM, c] = totals[c]
        out[DOT, c] = products[c]


@Kernel
def add_parameter_gradients(arrays: Any, operands: Any, factor: float) -> None:
    """Add `factor` times d/dg and d/db to a gain and a bias. Operands: norm, gain, bias."""
    norm, gain, bias = matrices(arrays, operands, 3)
    for c in range(gain.shape[1]):
        gain[0, c] += factor * norm[DEVIATION, c] * norm[DOT, c]
        bias[0, c] += factor * norm[SUM, c]


@Kernel
def gradient_by_input(arrays: Any, operands: Any, factor: float) -> None:
    """Compute d/dz from u; without its terms, if u is missing, as the block pools.

    Operands: z, norm, u or a matrix without rows, and the matrix that receives d/dz; may be u.
    """
    z, norm, u, delta = matrices(arrays, operands, 4)
    pixels, channels = z.shape
    scale = norm[SCALE]
    constant, slope = zeros(channels, z.dtype), zeros(channels, z.dtype)
    for c in range(channels):
        p = norm[DEVIATION, c] * norm[DEVIATION, c] * norm[DOT, c] / pixels
        constant[c] = scale[c] * (p * norm[MEAN, c] - norm[SUM, c] / pixels)
        slope[c] = -scale[c] * p
    if len(u) == 0:
        for row in range(pixels):
            for c in range(channels):
                delta[row, c] = slope[c] * z[row, c] + constant[c]
        return
    for row in range(pixels):
        for c in range(channels):
            delta[row, c] = scale[c] * u[row, c] + slope[c] * z[row, c] + constant[c]


@Kernel
def tangent_statistics(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the tangents of the mean, s, b and r.

    Operands: z, its tangent, gain, tangents of gain and bias, norm, norm_dot.
    """
    z, z_dot, gain, gain_dot, bias_dot, norm, norm_dot = matrices(arrays, operands, 7)
    pixels, channels = z.shape
    sums, dots = zeros(channels, np.float64), zeros(channels, np.float64)
    part, part_dot = zeros(channels, z.dtype), zeros(channels, z.dtype)
    mean = norm[MEAN]
    for start in range(0, pixels, ROWS):
        for c in range(channels):
            part[c] = 0
            part_dot[c] = 0
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                part[c] += z_dot[row, c]
                part_dot[c] += (z[row, c] - mean[c]) * z_dot[row, c]
        for c in range(channels):
            sums[c] += part[c]
            dots[c] += part_dot[c]
    for c in range(channels):
        r = norm[DEVIATION, c]
        r_dot = -r * r * r * dots[c] / pixels
        norm_dot[MEAN, c] = sums[c] / pixels
        norm_dot[SCALE, c] = gain_dot[0, c] * r + gain[0, c] * r_dot
        norm_dot[SHIFT, c] = bias_dot[0, c]
        norm_dot[DEVIATION, c] = r_dot


@Kernel
def add_terms_of_tangents(arrays: Any, operands: Any, factor: float) -> None:
    """Add sum u c' to t', whose other term is sum u' c. Operands: z_dot, u, norm, norm_dot."""
    z_dot, u, norm, norm_dot = matrices(arrays, operands, 4)
    pixels, channels = u.shape
    dots, part = zeros(channels, np.float64), zeros(channels, u.dtype)
    for start in range(0, pixels, ROWS):
        for c in range(channels):
            part[c] = 0
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                part[c] += u[row, c] * z_dot[row, c]
        for c in range(channels):
            dots[c] += part[c]
    for c in range(channels):
        norm_dot[DOT, c] += dots[c] - norm_dot[MEAN, c] * norm[SUM, c]


@Kernel
def add_parameter_curvatures(arrays: Any, operands: Any, factor: float) -> None:
    """Add `factor` times (d/dg)' and (d/db)' to a gain and a bias.

    Operands: norm, norm_dot, gain, bias.
    """
    norm, norm_dot, gain, bias = matrices(arrays, operands, 4)
    for c in range(gain.shape[1]):
        r, r_dot = norm[DEVIATION, c], norm_dot[DEVIATION, c]
        gain[0, c] += factor * (r_dot * norm[DOT, c] + r * norm_dot[DOT, c])
        bias[0, c] += factor * norm_dot[SUM, c]


@Kernel
def tangent_of_gradient_by_input(arrays: Any, operands: Any, factor: float) -> None:
    """Compute (d/dz)' but for the terms of u and u', in place of z'.

    Operands: z, norm, norm_dot, z_dot.
    """
    z, norm, norm_dot, z_dot = matrices(arrays, operands, 4)
    pixels, channels = z.shape
    constant, slope = zeros(channels, z.dtype), zeros(channels, z.dtype)
    slope_dot = zeros(channels, z.dtype)
    for c in range(channels):
        r, r_dot = norm[DEVIATION, c], norm_dot[DEVIATION, c]
        scale, scale_dot = norm[SCALE, c], norm_dot[SCALE, c]
        p = r * r * norm[DOT, c] / pixels
        p_dot = (2 * r * r_dot * norm[DOT, c] + r * r * norm_dot[DOT, c]) / pixels
        slope[c] = -scale_dot * p - scale * p_dot
        slope_dot[c] = -scale * p
        sums = scale_dot * norm[SUM, c] + scale * norm_dot[SUM, c]
        constant[c] = -sums / pixels - slope[c] * norm[MEAN, c] - slope_dot[c] * norm_dot[MEAN, c]
    for row in range(pixels):
        for c in range(channels):
            z_dot[row, c] = slope[c] * z[row, c] + slope_dot[c] * z_dot[row, c] + constant[c]


@Kernel
def add_tangents_of_u(arrays: Any, operands: Any, factor: float) -> None:
    """Add the terms of u and u' to (d/dz)'. Operands: u, u_dot, norm, norm_dot, (d/dz)'."""
    u, u_dot, norm, norm_dot, out = matrices(arrays, operands, 5)
    scale, scale_dot = norm[SCALE], norm_dot[SCALE]
    for row in range(len(out)):
        for c in range(out.shape[1]):
            out[row, c] += scale_dot[c] * u[row, c] + scale[c] * u_dot[row, c]
