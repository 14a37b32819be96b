"""A convolutional block: convolution, batch normalisation, ReLU and pooling, and their derivatives."""

from typing import Any

from maml_pipeline.meta_gradient.native.columns import gather, gather_images, gather_tangents, scatter
from maml_pipeline.meta_gradient.native.layout import (
    BIAS,
    CHANNELS,
    FILTERS,
    GAIN,
    KERNEL,
    NORM,
    NORM_DOT,
    OUTPUT_PIXELS,
    PEAKS,
    PEAKS_DOT,
    PIXELS,
    POOLS,
    ROWS,
    WEIGHT,
    WINNERS,
    Z_DOT,
    U,
    Z,
)
from maml_pipeline.meta_gradient.native.normalisation import (
    DEVIATION,
    DOT,
    NORM_ROWS,
    SCALE,
    SUM,
    add_tangents_of_u,
    gradient_by_input,
    mask_and_sum,
    mask_and_sum_tangents,
    statistics,
    tangent_of_gradient_by_input,
    tangent_statistics,
)
from maml_pipeline.meta_gradient.native.numba_internals import compiled, matrix
from maml_pipeline.meta_gradient.native.pooling import add_to_winners, find_peaks, of_winners
from maml_pipeline.meta_gradient.native.products import (
    add,
    add_scaled,
    copy,
    fill,
    product,
    product_by_input,
    product_by_weights,
)


@compiled
def weights_of(block: Any, parameters: Any) -> Any:
    """View the weights of a block: `(filters, kernel * kernel * channels)`."""
    return matrix(parameters, block[WEIGHT], block[FILTERS], block[KERNEL] ** 2 * block[CHANNELS])


@compiled
def channels_of(block: Any, array: Any, offset: int) -> Any:
    """View a vector with a number for each channel of a block's output."""
    return array[offset : offset + block[FILTERS]]


@compiled
def pixels_of(block: Any, array: Any, offset: int) -> Any:
    """View a matrix with a row for each pixel of a block's output."""
    return matrix(array, offset, block[PIXELS], block[FILTERS])


@compiled
def outputs_of(block: Any, array: Any, offset: int) -> Any:
    """View a matrix with a row for each pixel of a block's output after pooling."""
    return matrix(array, offset, block[OUTPUT_PIXELS], block[FILTERS])


@compiled
def norm_of(block: Any, array: Any, offset: int) -> Any:
    """View the statistics of a block's normalisation."""
    return matrix(array, offset, NORM_ROWS, block[FILTERS])


@compiled
def rows_with_tangents(block: Any, level: int) -> int:
    """Return the rows of columns that are made at once, if those of tangents need the same room."""
    return block[ROWS] if level == 0 else max(1, block[ROWS] // 2)  # type: ignore[no-any-return]


@compiled
def gather_input(blocks: Any, level: int, images: Any, record: Any, first: int, columns: Any) -> None:
    """Gather columns of the input of a block: the images, or the output of the block before."""
    if level == 0:
        gather_images(blocks[0], images.ravel(), first, columns)
    else:
        before = blocks[level - 1]
        peaks, norm = outputs_of(before, record, before[PEAKS]), norm_of(before, record, before[NORM])
        gather(blocks[level], peaks, norm, first, columns)


@compiled
def gather_input_tangents(
    blocks: Any, level: int, record: Any, tangents: Any, first: int, columns: Any, columns_dot: Any
) -> None:
    """Gather columns of the output of the block before, and of its tangent."""
    before = blocks[level - 1]
    peaks, norm = outputs_of(before, record, before[PEAKS]), norm_of(before, record, before[NORM])
    gather(blocks[level], peaks, norm, first, columns)
    gather_tangents(
        blocks[level],
        peaks,
        outputs_of(before, tangents, before[PEAKS_DOT]),
        norm,
        norm_of(before, tangents, before[NORM_DOT]),
        columns,
        first,
        columns_dot,
    )


@compiled
def block_values(layout: Any, level: int, theta: Any, images: Any, record: Any, work: Any) -> None:
    """Compute z and the statistics of a block."""
    block = layout.blocks[level]
    weights, z = weights_of(block, theta), pixels_of(block, record, block[Z])
    for first in range(0, block[PIXELS], block[ROWS]):
        end = min(first + block[ROWS], block[PIXELS])
        part = matrix(work.columns, 0, end - first, weights.shape[1])
        gather_input(layout.blocks, level, images, record, first, part)
        product(part, weights, z[first:end])
    gain, bias = channels_of(block, theta, block[GAIN]), channels_of(block, theta, block[BIAS])
    norm = norm_of(block, record, block[NORM])
    statistics(z, gain, bias, layout.eps[level], norm)
    if block[POOLS]:
        winners, peaks = (
            outputs_of(block, record, block[WINNERS]),
            outputs_of(block, record, block[PEAKS]),
        )
        find_peaks(block, z, norm, winners, peaks)


@compiled
def add_block_gradient(
    layout: Any,
    level: int,
    theta: Any,
    images: Any,
    record: Any,
    keeps_u: bool,
    work: Any,
    factor: float,
    target: Any,
) -> None:
    """Add `factor` times the gradient by a block's parameters to `target`; fill u of the block before.

    u of this block holds the gradient by its output. The gradient by z overwrites it unless it is kept.
    `target` may be theta, or have no elements: then only u of the block before is computed.
    """
    block = layout.blocks[level]
    z, u = pixels_of(block, record, block[Z]), outputs_of(block, record, block[U])
    norm = norm_of(block, record, block[NORM])
    mask_and_sum(outputs_of(block, record, block[PEAKS]), u, norm, norm[SUM], norm[DOT])
    delta = pixels_of(block, work.delta, 0) if keeps_u or block[POOLS] else u
    if block[POOLS]:
        fill(delta.ravel(), 0)
    elif keeps_u:
        copy(u.ravel(), delta.ravel())
    gradient_by_input(z, norm, delta)
    if block[POOLS]:
        add_to_winners(block, norm[SCALE], u, outputs_of(block, record, block[WINNERS]), delta)
    has_target = target.size > 0
    if has_target:
        gain, bias = channels_of(block, target, block[GAIN]), channels_of(block, target, block[BIAS])
        for c in range(block[FILTERS]):
            gain[c] += factor * norm[DEVIATION, c] * norm[DOT, c]
            bias[c] += factor * norm[SUM, c]

    weights = weights_of(block, theta)
    filters, width = weights.shape
    total, part_total = (
        matrix(work.sums, 0, filters, width),
        matrix(work.sums, weights.size, filters, width),
    )
    fill(total.ravel(), 0)
    before = layout.blocks[max(level - 1, 0)]
    u_before = outputs_of(before, record, before[U])
    if level > 0:
        fill(u_before.ravel(), 0)
    for first in range(0, block[PIXELS], block[ROWS]):
        end = min(first + block[ROWS], block[PIXELS])
        part = matrix(work.columns, 0, end - first, width)
        if has_target:
            gather_input(layout.blocks, level, images, record, first, part)
            product_by_weights(delta[first:end], part, part_total)
            add(part_total, total)
        if level > 0:
            product_by_input(delta[first:end], weights, part)
            scatter(block, part, first, u_before)
    if has_target:
        add_scaled(factor, total, weights_of(block, target))


@compiled
def block_tangents(
    layout: Any,
    level: int,
    theta: Any,
    direction: Any,
    images: Any,
    record: Any,
    tangents: Any,
    work: Any,
) -> None:
    """Compute the tangents of z and the statistics of a block, as theta moves in a direction."""
    block = layout.blocks[level]
    weights, weights_dot = weights_of(block, theta), weights_of(block, direction)
    z, z_dot = pixels_of(block, record, block[Z]), pixels_of(block, tangents, block[Z_DOT])
    rows = rows_with_tangents(block, level)
    for first in range(0, block[PIXELS], rows):
        end = min(first + rows, block[PIXELS])
        part = matrix(work.columns, 0, end - first, weights.shape[1])
        if level == 0:
            gather_images(block, images.ravel(), first, part)
            product(part, weights_dot, z_dot[first:end])
            continue
        part_dot = matrix(work.columns, part.size, end - first, weights.shape[1])
        gather_input_tangents(layout.blocks, level, record, tangents, first, part, part_dot)
        product(part, weights_dot, z_dot[first:end])
        from_input = matrix(work.part, 0, end - first, block[FILTERS])
        product(part_dot, weights, from_input)
        add(from_input, z_dot[first:end])
    tangent_statistics(
        z,
        z_dot,
        channels_of(block, theta, block[GAIN]),
        channels_of(block, direction, block[GAIN]),
        channels_of(block, direction, block[BIAS]),
        norm_of(block, record, block[NORM]),
        norm_of(block, tangents, block[NORM_DOT]),
    )
    if block[POOLS]:
        winners = outputs_of(block, record, block[WINNERS])
        of_winners(block, z_dot, winners, outputs_of(block, tangents, block[PEAKS_DOT]))


@compiled
def add_block_curvature(
    layout: Any,
    level: int,
    theta: Any,
    direction: Any,
    images: Any,
    record: Any,
    tangents: Any,
    work: Any,
    factor: float,
    target: Any,
) -> None:
    """Add `factor` times the tangent of the gradient by a block's parameters to `target`.

    `work.u_dot` holds the tangent of the gradient by the block's output, and receives that of the block
    before. u and the tangent of z are overwritten. `target` may be the direction.
    """
    block = layout.blocks[level]
    pools = block[POOLS]
    z, u = pixels_of(block, record, block[Z]), outputs_of(block, record, block[U])
    z_dot, u_dot = pixels_of(block, tangents, block[Z_DOT]), outputs_of(block, work.u_dot, 0)
    norm, norm_dot = norm_of(block, record, block[NORM]), norm_of(block, tangents, block[NORM_DOT])
    peaks = outputs_of(block, record, block[PEAKS])
    peaks_dot = outputs_of(block, tangents, block[PEAKS_DOT])
    mask_and_sum_tangents(peaks, peaks_dot, u, u_dot, norm, norm_dot)
    delta, delta_dot = pixels_of(block, work.delta, 0) if pools else u, z_dot
    tangent_of_gradient_by_input(z, norm, norm_dot, delta_dot)
    if not pools:
        add_tangents_of_u(u, u_dot, norm, norm_dot, delta_dot)
        gradient_by_input(z, norm, delta)
    else:
        fill(delta.ravel(), 0)
        gradient_by_input(z, norm, delta)
        winners = outputs_of(block, record, block[WINNERS])
        add_to_winners(block, norm_dot[SCALE], u, winners, delta_dot)
        add_to_winners(block, norm[SCALE], u_dot, winners, delta_dot)
        add_to_winners(block, norm[SCALE], u, winners, delta)
    gain, bias = channels_of(block, target, block[GAIN]), channels_of(block, target, block[BIAS])
    for c in range(block[FILTERS]):
        gain[c] += factor * (
            norm_dot[DEVIATION, c] * norm[DOT, c] + norm[DEVIATION, c] * norm_dot[DOT, c]
        )
        bias[c] += factor * norm_dot[SUM, c]

    weights, weights_dot = weights_of(block, theta), weights_of(block, direction)
    filters, width = weights.shape
    total, part_total = (
        matrix(work.sums, 0, filters, width),
        matrix(work.sums, weights.size, filters, width),
    )
    fill(total.ravel(), 0)
    before = layout.blocks[max(level - 1, 0)]
    u_dot_before = outputs_of(before, work.u_dot, 0)
    if level > 0:
        fill(u_dot_before.ravel(), 0)
    rows = rows_with_tangents(block, level)
    for first in range(0, block[PIXELS], rows):
        end = min(first + rows, block[PIXELS])
        part = matrix(work.columns, 0, end - first, width)
        if level == 0:
            gather_images(block, images.ravel(), first, part)
            product_by_weights(delta_dot[first:end], part, part_total)
            add(part_total, total)
            continue
        part_dot = matrix(work.columns, part.size, end - first, width)
        gather_input_tangents(layout.blocks, level, record, tangents, first, part, part_dot)
        product_by_weights(delta_dot[first:end], part, part_total)
        add(part_total, total)
        product_by_weights(delta[first:end], part_dot, part_total)
        add(part_total, total)
        product_by_input(delta_dot[first:end], weights, part)
        scatter(block, part, first, u_dot_before)
        product_by_input(delta[first:end], weights_dot, part)
        scatter(block, part, first, u_dot_before)
    add_scaled(factor, total, weights_of(block, target))
