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

from maml_pipeline.meta_gradient.native.numba_internals import compiled
from maml_pipeline.meta_gradient.native.products import fill

MEAN, SCALE, SHIFT, DEVIATION, SUM, DOT = range(6)
"""Rows of `norm`: the mean, s, b, r, sum u and t above."""

NORM_ROWS = 6
ROWS = 64  # summed in the networks' own precision before they are added to sums in float64


@compiled
def statistics(z: Any, gain: Any, bias: Any, eps: float, norm: Any) -> None:
    """Compute the mean, s, b and r of the channels."""
    pixels, channels = z.shape
    total, part = np.zeros(channels), np.empty(channels, z.dtype)
    mean, scale, shift, deviation = norm[MEAN], norm[SCALE], norm[SHIFT], norm[DEVIATION]
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                part[c] += z[row, c]
        for c in range(channels):
            total[c] += part[c]
    for c in range(channels):
        mean[c] = total[c] / pixels
        total[c] = 0
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                centred = z[row, c] - mean[c]
                part[c] += centred * centred
        for c in range(channels):
            total[c] += part[c]
    for c in range(channels):
        deviation[c] = 1 / np.sqrt(total[c] / pixels + eps)
        scale[c] = gain[c] * deviation[c]
        shift[c] = bias[c]


@compiled
def mask_and_sum(z: Any, u: Any, norm: Any, sums: Any, dots: Any) -> None:
    """Set u to 0 where y = 0, and compute its sums, and its dot products with c, over pixels."""
    pixels, channels = z.shape
    totals, products, zero = np.zeros(channels), np.zeros(channels), z.dtype.type(0)
    part, part_dot = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    mean, scale, shift = norm[MEAN], norm[SCALE], norm[SHIFT]
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        fill(part_dot, 0)
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                centred = z[row, c] - mean[c]
                value = u[row, c] if scale[c] * centred + shift[c] > zero else zero
                u[row, c] = value
                part[c] += value
                part_dot[c] += value * centred
        for c in range(channels):
            totals[c] += part[c]
            products[c] += part_dot[c]
    for c in range(channels):
        sums[c] = totals[c]
        dots[c] = products[c]


@compiled
def gradient_by_input(z: Any, norm: Any, delta: Any) -> None:
    """Compute d/dz in place; `delta` holds u, or zeros if the block pools."""
    pixels, channels = z.shape
    scale = norm[SCALE]
    constant, slope = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    for c in range(channels):
        p = norm[DEVIATION, c] * norm[DEVIATION, c] * norm[DOT, c] / pixels
        constant[c] = scale[c] * (p * norm[MEAN, c] - norm[SUM, c] / pixels)
        slope[c] = -scale[c] * p
    for row in range(pixels):
        for c in range(channels):
            delta[row, c] = scale[c] * delta[row, c] + slope[c] * z[row, c] + constant[c]


@compiled
def tangent_statistics(
    z: Any, z_dot: Any, gain: Any, gain_dot: Any, bias_dot: Any, norm: Any, norm_dot: Any
) -> None:
    """Compute the tangents of the mean, s, b and r."""
    pixels, channels = z.shape
    sums, dots = np.zeros(channels), np.zeros(channels)
    part, part_dot = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    mean = norm[MEAN]
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        fill(part_dot, 0)
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
        norm_dot[SCALE, c] = gain_dot[c] * r + gain[c] * r_dot
        norm_dot[SHIFT, c] = bias_dot[c]
        norm_dot[DEVIATION, c] = r_dot


@compiled
def mask_and_sum_tangents(z: Any, z_dot: Any, u: Any, u_dot: Any, norm: Any, norm_dot: Any) -> None:
    """Set the tangent of u to 0 where y = 0, and compute the tangents of sum u and t."""
    pixels, channels = z.shape
    mask_and_sum(z, u_dot, norm, norm_dot[SUM], norm_dot[DOT])
    dots, part = np.zeros(channels), np.empty(channels, z.dtype)
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                part[c] += u[row, c] * z_dot[row, c]
        for c in range(channels):
            dots[c] += part[c]
    for c in range(channels):
        norm_dot[DOT, c] += dots[c] - norm_dot[MEAN, c] * norm[SUM, c]


@compiled
def tangent_of_gradient_by_input(z: Any, norm: Any, norm_dot: Any, z_dot: Any) -> None:
    """Compute the tangent of d/dz but for the terms of u and u', in place of that of z."""
    pixels, channels = z.shape
    constant, slope = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    slope_dot = np.empty(channels, z.dtype)
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


@compiled
def add_tangents_of_u(u: Any, u_dot: Any, norm: Any, norm_dot: Any, out: Any) -> None:
    """Add the terms of u and u' to the tangent of d/dz."""
    scale, scale_dot = norm[SCALE], norm_dot[SCALE]
    for row in range(len(out)):
        for c in range(out.shape[1]):
            out[row, c] += scale_dot[c] * u[row, c] + scale[c] * u_dot[row, c]
