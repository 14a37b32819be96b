"""The convolution of a block, z = columns w^T, and its derivatives, as calls of kernels.

The columns are made part by part (`columns.py`). A prime marks a tangent, as in `normalisation.py`.
"""

from collections.abc import Iterator

from maml_pipeline.meta_gradient.native.columns import (
    gather,
    gather_images,
    gather_tangents,
    scatter,
)
from maml_pipeline.meta_gradient.native.kernels import (
    IMAGES,
    TARGET,
    VECTOR,
    Program,
    View,
)
from maml_pipeline.meta_gradient.native.layout import BlockLayout, Layout
from maml_pipeline.meta_gradient.native.products import add_scaled, clear, multiply


def convolution(program: Program, layout: Layout, level: int) -> None:
    """Append the computation of z."""
    block = layout.blocks[level]
    for first, end in _parts(block, block.rows):
        columns = layout.columns.matrix(end - first, block.weight.columns)
        _gather(program, layout, level, first, columns)
        multiply(program, columns, block.weight, block.z.part(first, end), transpose_b=True)


def convolution_gradient(
    program: Program, layout: Layout, level: int, delta: View, has_target: bool
) -> None:
    """Append `target` += factor d/dw with d/dw = delta^T columns, and u of the block before.

    `target` may be theta, so it changes last.
    """
    block, u_before = layout.blocks[level], layout.blocks[level - 1].u
    total = layout.weight_sum.matrix(block.weight.rows, block.weight.columns)
    if level > 0:
        program.call(clear, u_before)
    for first, end in _parts(block, block.rows):
        columns, rows = layout.columns.matrix(end - first, block.weight.columns), delta.part(first, end)
        if has_target:
            _gather(program, layout, level, first, columns)
            multiply(program, rows, columns, total, transpose_a=True, add=first > 0)
        if level > 0:
            multiply(program, rows, block.weight, columns)
            program.call(scatter, columns, u_before, *block.geometry, first)
    if has_target:
        program.call(add_scaled, total, block.weight.of(TARGET))


def convolution_tangents(program: Program, layout: Layout, level: int) -> None:
    """Append z' = columns w'^T + columns' w^T."""
    block = layout.blocks[level]
    for first, end in _parts(block, _rows_with_tangents(block, level)):
        columns, columns_dot = _columns_and_tangents(layout, block, end - first)
        z_dot = block.z_dot.part(first, end)
        _gather(program, layout, level, first, columns)
        multiply(program, columns, block.weight.of(VECTOR), z_dot, transpose_b=True)
        if level > 0:
            _gather_tangents(program, layout, level, first, columns, columns_dot)
            multiply(program, columns_dot, block.weight, z_dot, transpose_b=True, add=True)


def convolution_curvature(
    program: Program, layout: Layout, level: int, delta: View, delta_dot: View
) -> None:
    """Append `target` += factor (delta'^T columns + delta^T columns'), and u' of the block before.

    That is the tangent of the gradient by w. `target` may be the vector, so it changes last.
    """
    block, u_before = layout.blocks[level], layout.blocks[level - 1].u
    u_dot = layout.u_dot.matrix(u_before.rows, u_before.columns)
    total = layout.weight_sum.matrix(block.weight.rows, block.weight.columns)
    if level > 0:
        program.call(clear, u_dot)
    for first, end in _parts(block, _rows_with_tangents(block, level)):
        columns, columns_dot = _columns_and_tangents(layout, block, end - first)
        rows, rows_dot = delta.part(first, end), delta_dot.part(first, end)
        _gather(program, layout, level, first, columns)
        multiply(program, rows_dot, columns, total, transpose_a=True, add=first > 0)
        if level > 0:
            _gather_tangents(program, layout, level, first, columns, columns_dot)
            multiply(program, rows, columns_dot, total, transpose_a=True, add=True)
            multiply(program, rows_dot, block.weight, columns)
            multiply(program, rows, block.weight.of(VECTOR), columns, add=True)
            program.call(scatter, columns, u_dot, *block.geometry, first)
    program.call(add_scaled, total, block.weight.of(TARGET))


def _parts(block: BlockLayout, rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, block.z.rows, rows):
        yield first, min(first + rows, block.z.rows)


def _rows_with_tangents(block: BlockLayout, level: int) -> int:
    """Return the rows of columns that are made at once, if those of tangents need the same room."""
    return block.rows if level == 0 else max(1, block.rows // 2)


def _columns_and_tangents(layout: Layout, block: BlockLayout, rows: int) -> tuple[View, View]:
    columns = layout.columns.matrix(rows, block.weight.columns)
    return columns, layout.columns.matrix(rows, block.weight.columns, start=columns.size)


def _gather(program: Program, layout: Layout, level: int, first: int, columns: View) -> None:
    """Append the columns of a block's input: the images, or the output of the block before."""
    geometry = (*layout.blocks[level].geometry, first)
    if level == 0:
        program.call(gather_images, View(IMAGES, 0, 0, 0), columns, *geometry)
    else:
        before = layout.blocks[level - 1]
        program.call(gather, before.peaks, before.norm, columns, *geometry)


def _gather_tangents(
    program: Program, layout: Layout, level: int, first: int, columns: View, columns_dot: View
) -> None:
    """Append the columns of the tangents of a block's input."""
    before, geometry = layout.blocks[level - 1], (*layout.blocks[level].geometry, first)
    statistics = before.norm, before.norm_dot
    program.call(
        gather_tangents, before.peaks, before.peaks_dot, *statistics, columns, columns_dot, *geometry
    )
