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
def mask_and_sum(z: Any, u: Any, norm: Any) -> None:
    """Set the gradient u to 0 where y = 0, and compute sum u and t."""
    pixels, channels = z.shape
    totals, dots = np.zeros(channels), np.zeros(channels)
    part, part_dot = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    zero = z.dtype.type(0)
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
            dots[c] += part_dot[c]
    for c in range(channels):
        norm[SUM, c] = totals[c]
        norm[DOT, c] = dots[c]


@compiled
def gradient_by_input(z: Any, u: Any, pools: bool, norm: Any, out: Any) -> None:
    """Compute d/dz, without its term s u if the block pools; `out` may be u itself."""
    pixels, channels = z.shape
    mean, scale = norm[MEAN], norm[SCALE]
    constant, slope = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    for c in range(channels):
        p = norm[DEVIATION, c] * norm[DEVIATION, c] * norm[DOT, c] / pixels
        constant[c] = scale[c] * (p * mean[c] - norm[SUM, c] / pixels)
        slope[c] = -scale[c] * p
    zero = z.dtype.type(0)
    for row in range(pixels):
        for c in range(channels):
            out[row, c] = slope[c] * z[row, c] + constant[c] + (zero if pools else scale[c] * u[row, c])


@compiled
def tangent_statistics(
    z: Any, z_dot: Any, gain: Any, gain_dot: Any, bias_dot: Any, norm: Any, norm_dot: Any
) -> None:
    """Compute the tangents of the mean, s, b and r."""
    pixels, channels = z.shape
    totals, dots = np.zeros(channels), np.zeros(channels)
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
            totals[c] += part[c]
            dots[c] += part_dot[c]
    for c in range(channels):
        r = norm[DEVIATION, c]
        r_dot = -r * r * r * dots[c] / pixels
        norm_dot[MEAN, c] = totals[c] / pixels
        norm_dot[SCALE, c] = gain_dot[c] * r + gain[c] * r_dot
        norm_dot[SHIFT, c] = bias_dot[c]
        norm_dot[DEVIATION, c] = r_dot


@compiled
def mask_and_sum_tangents(z: Any, z_dot: Any, u: Any, u_dot: Any, norm: Any, norm_dot: Any) -> None:
    """Set the tangent of u to 0 where y = 0, and compute the tangents of sum u and t."""
    pixels, channels = z.shape
    totals, dots = np.zeros(channels), np.zeros(channels)
    part, part_dot = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    zero = z.dtype.type(0)
    mean, scale, shift, mean_dot = norm[MEAN], norm[SCALE], norm[SHIFT], norm_dot[MEAN]
    for start in range(0, pixels, ROWS):
        fill(part, 0)
        fill(part_dot, 0)
        for row in range(start, min(start + ROWS, pixels)):
            for c in range(channels):
                centred = z[row, c] - mean[c]
                value = u_dot[row, c] if scale[c] * centred + shift[c] > zero else zero
                u_dot[row, c] = value
                part[c] += value
                part_dot[c] += value * centred + u[row, c] * (z_dot[row, c] - mean_dot[c])
        for c in range(channels):
            totals[c] += part[c]
            dots[c] += part_dot[c]
    for c in range(channels):
        norm_dot[SUM, c] = totals[c]
        norm_dot[DOT, c] = dots[c]


@compiled
def tangent_of_gradient_by_input(
    z: Any, z_dot: Any, u: Any, u_dot: Any, pools: bool, norm: Any, norm_dot: Any, out: Any
) -> None:
    """Compute the tangent of d/dz, without that of s u if the block pools; `out` may be `z_dot`."""
    pixels, channels = z.shape
    mean, scale, scale_dot, mean_dot = norm[MEAN], norm[SCALE], norm_dot[SCALE], norm_dot[MEAN]
    constant, slope = np.empty(channels, z.dtype), np.empty(channels, z.dtype)
    slope_dot = np.empty(channels, z.dtype)
    for c in range(channels):
        r, r_dot = norm[DEVIATION, c], norm_dot[DEVIATION, c]
        p = r * r * norm[DOT, c] / pixels
        p_dot = (2 * r * r_dot * norm[DOT, c] + r * r * norm_dot[DOT, c]) / pixels
        slope[c] = -scale_dot[c] * p - scale[c] * p_dot
        slope_dot[c] = -scale[c] * p
        constant[c] = (
            -scale_dot[c] * norm[SUM, c] / pixels
            - scale[c] * norm_dot[SUM, c] / pixels
            - slope[c] * mean[c]
            - slope_dot[c] * mean_dot[c]
        )
    zero = z.dtype.type(0)
    for row in range(pixels):
        for c in range(channels):
            of_u = zero if pools else scale_dot[c] * u[row, c] + scale[c] * u_dot[row, c]
            out[row, c] = slope[c] * z[row, c] + slope_dot[c] * z_dot[row, c] + constant[c] + of_u
