"""The programs of a network: predictions, the gradient of a set's loss, and the product of its Hessian.

The Hessian-vector product is forward over reverse: the tangents of all intermediate values as theta
moves along the vector, then the tangents of all gradients.

References:
    Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""

from functools import lru_cache

from maml_pipeline.meta_gradient.native.convolution import (
    convolution,
    convolution_curvature,
    convolution_gradient,
    convolution_tangents,
)
from maml_pipeline.meta_gradient.native.dense import (
    dense_curvature,
    dense_gradient,
    dense_tangents,
    dense_values,
)
from maml_pipeline.meta_gradient.native.features import (
    feature_gradient,
    feature_tangents,
    feature_values,
)
from maml_pipeline.meta_gradient.native.kernels import TARGET, VECTOR, Program
from maml_pipeline.meta_gradient.native.layout import Layout
from maml_pipeline.meta_gradient.native.normalisation import (
    add_parameter_curvatures,
    add_parameter_gradients,
    add_tangents_of_u,
    add_terms_of_tangents,
    gradient_by_input,
    mask_and_sum,
    statistics,
    tangent_of_gradient_by_input,
    tangent_statistics,
)
from maml_pipeline.meta_gradient.native.pooling import add_to_winners, find_peaks, of_winners


@lru_cache(maxsize=64)
def prediction_program(layout: Layout) -> Program:
    """Return the program that predicts examples."""
    program = Program(layout.dtype)
    for level in range(len(layout.blocks)):
        _block(program, layout, level)
    if layout.blocks:
        last = layout.blocks[-1]
        program.call(feature_values, last.peaks, last.norm, layout.dense[0].x)
    dense_values(program, layout)
    return program


@lru_cache(maxsize=64)
def gradient_program(layout: Layout, keeps_u: bool, has_target: bool) -> Program:
    """Return the program that adds `factor` times the gradient of the loss to the target.

    Args:
        layout: Layout of the set.
        keeps_u: Keep u in the record.
        has_target: There is a target; otherwise only the record is filled.
    """
    program = Program(layout.dtype)
    program.extend(prediction_program(layout))
    dense_gradient(program, layout, has_target)
    if layout.blocks:
        program.call(feature_gradient, layout.features, layout.blocks[-1].u)
    for level in reversed(range(len(layout.blocks))):
        _block_gradient(program, layout, level, keeps_u, has_target)
    return program


@lru_cache(maxsize=64)
def curvature_program(layout: Layout) -> Program:
    """Return the program that adds `factor` times the Hessian times the vector to the target.

    It reads the record of the gradient at theta, with u, and overwrites it. `target` may be the vector.
    """
    program = Program(layout.dtype)
    for level in range(len(layout.blocks)):
        _block_tangents(program, layout, level)
    if layout.blocks:
        last = layout.blocks[-1]
        operands = last.peaks, last.peaks_dot, last.norm, last.norm_dot, layout.dense[0].x_dot
        program.call(feature_tangents, *operands)
    dense_tangents(program, layout)
    dense_curvature(program, layout)
    if layout.blocks:
        u_dot = layout.u_dot.matrix(last.u.rows, last.u.columns)
        program.call(feature_gradient, layout.features, u_dot)
    for level in reversed(range(len(layout.blocks))):
        _block_curvature(program, layout, level)
    return program


def _block(program: Program, layout: Layout, level: int) -> None:
    """Append z and the statistics of a block, and the winners if it pools."""
    block = layout.blocks[level]
    convolution(program, layout, level)
    program.call(statistics, block.z, block.gain, block.bias, block.norm, block.eps)
    if block.pools:
        program.call(find_peaks, block.z, block.norm, block.winners, block.peaks, *block.out_size)


def _block_gradient(
    program: Program, layout: Layout, level: int, keeps_u: bool, has_target: bool
) -> None:
    """Append the gradient by a block's parameters, and u of the block before.

    u of this block holds the gradient by its output. That by z overwrites it unless it is kept.
    """
    block = layout.blocks[level]
    overwrites_u = not keeps_u and not block.pools
    delta = block.u if overwrites_u else layout.z_gradient.matrix(block.z.rows, block.z.columns)
    program.call(mask_and_sum, block.peaks, block.u, block.norm, block.norm)
    if has_target:
        gain, bias = block.gain.of(TARGET), block.bias.of(TARGET)
        program.call(add_parameter_gradients, block.norm, gain, bias)
    if block.pools:
        program.call(gradient_by_input, block.z, block.norm, block.u.part(0, 0), delta)
        operands = block.norm, block.u, block.winners, delta
        program.call(add_to_winners, *operands, *block.out_size)
    else:
        program.call(gradient_by_input, block.z, block.norm, block.u, delta)
    convolution_gradient(program, layout, level, delta, has_target)


def _block_tangents(program: Program, layout: Layout, level: int) -> None:
    """Append the tangents of z and the statistics of a block, and of the winners if it pools."""
    block = layout.blocks[level]
    convolution_tangents(program, layout, level)
    gain_dot, bias_dot = block.gain.of(VECTOR), block.bias.of(VECTOR)
    operands = block.gain, gain_dot, bias_dot, block.norm, block.norm_dot
    program.call(tangent_statistics, block.z, block.z_dot, *operands)
    if block.pools:
        program.call(of_winners, block.z_dot, block.winners, block.peaks_dot, *block.out_size)


def _block_curvature(program: Program, layout: Layout, level: int) -> None:
    """Append the tangents of the gradient by a block's parameters, and of u of the block before.

    `layout.u_dot` holds the tangents of u of this block and receives those of the block before. u and
    the tangents of z are overwritten.
    """
    block = layout.blocks[level]
    u, norm, norm_dot, delta_dot = block.u, block.norm, block.norm_dot, block.z_dot
    u_dot = layout.u_dot.matrix(u.rows, u.columns)
    program.call(mask_and_sum, block.peaks, u_dot, norm, norm_dot)
    program.call(add_terms_of_tangents, block.peaks_dot, u, norm, norm_dot)
    gain, bias = block.gain.of(TARGET), block.bias.of(TARGET)
    program.call(add_parameter_curvatures, norm, norm_dot, gain, bias)
    program.call(tangent_of_gradient_by_input, block.z, norm, norm_dot, delta_dot)
    if block.pools:
        delta = layout.z_gradient.matrix(block.z.rows, block.z.columns)
        program.call(gradient_by_input, block.z, norm, u.part(0, 0), delta)
        for scale, values, out in (
            (norm_dot, u, delta_dot),
            (norm, u_dot, delta_dot),
            (norm, u, delta),
        ):
            program.call(add_to_winners, scale, values, block.winners, out, *block.out_size)
    else:
        delta = u
        program.call(add_tangents_of_u, u, u_dot, norm, norm_dot, delta_dot)
        program.call(gradient_by_input, block.z, norm, u, delta)
    convolution_curvature(program, layout, level, delta, delta_dot)
