"""Fully connected layers with ReLUs in between, the loss, and their derivatives, as calls of kernels.

A layer is z = x w^T + b, and x of the next one is max(z, 0). A prime marks a tangent, as in
`normalisation.py`.
"""

from maml_pipeline.meta_gradient.native import losses
from maml_pipeline.meta_gradient.native.kernels import (
    LABELS,
    LOSS,
    PREDICTION,
    TARGET,
    VALUES,
    VECTOR,
    Program,
    View,
)
from maml_pipeline.meta_gradient.native.layout import Layout
from maml_pipeline.meta_gradient.native.products import (
    add_rows,
    add_to_rows,
    add_to_rows_and_rectify,
    mask,
    multiply,
)


def dense_values(program: Program, layout: Layout) -> None:
    """Append the prediction, and x of each layer but the first one."""
    for level, layer in enumerate(layout.dense):
        is_last = layer is layout.dense[-1]
        z = layer.delta.start_of(PREDICTION) if is_last else layout.dense[level + 1].x
        multiply(program, layer.x, layer.weight, z, transpose_b=True)
        program.call(add_to_rows if is_last else add_to_rows_and_rectify, layer.bias, z)


def dense_gradient(program: Program, layout: Layout, has_target: bool) -> None:
    """Append the loss, each delta, and `target` += factor times the gradients by w and b.

    The gradient by the input of the first layer is computed if there are blocks. `target` may be theta,
    so that w changes last.
    """
    last = layout.dense[-1]
    prediction, loss = last.delta.start_of(PREDICTION), View(LOSS, 0, 1, 1)
    if layout.classifies:
        program.call(losses.cross_entropy, prediction, last.delta, loss, _labels(layout))
    else:
        program.call(losses.squared_error, prediction, last.delta.start_of(VALUES), last.delta, loss)
    for level in reversed(range(len(layout.dense))):
        layer = layout.dense[level]
        if level > 0:
            before = layout.dense[level - 1].delta
            multiply(program, layer.delta, layer.weight, before)
            program.call(mask, layer.x.row, before.row)
        elif layout.blocks:
            multiply(program, layer.delta, layer.weight, layout.features)
        if has_target:
            weight = layer.weight.of(TARGET)
            multiply(program, layer.delta, layer.x, weight, transpose_a=True, add=True, scale=True)
            program.call(add_rows, layer.delta, layer.bias.of(TARGET))


def dense_tangents(program: Program, layout: Layout) -> None:
    """Append z' = x w'^T + x' w^T + b' and x' of each layer, and delta' of the last one.

    The input of the first layer has tangents if there are blocks.
    """
    for level, layer in enumerate(layout.dense):
        is_last = layer is layout.dense[-1]
        z_dot = layout.prediction_dot if is_last else layout.dense[level + 1].x_dot
        multiply(program, layer.x, layer.weight.of(VECTOR), z_dot, transpose_b=True)
        if layer.x_dot.size:
            multiply(program, layer.x_dot, layer.weight, z_dot, transpose_b=True, add=True)
        program.call(add_to_rows, layer.bias.of(VECTOR), z_dot)
        if not is_last:
            program.call(mask, layout.dense[level + 1].x.row, z_dot.row)
    last = layout.dense[-1]
    if layout.classifies:
        operands = last.delta, layout.prediction_dot, last.delta_dot, _labels(layout)
        program.call(losses.cross_entropy_tangent, *operands)
    else:
        program.call(losses.squared_error_tangent, layout.prediction_dot, last.delta_dot)


def dense_curvature(program: Program, layout: Layout) -> None:
    """Append each delta', and `target` += factor times the tangents of the gradients by w and b.

    The tangent of the gradient by the input of the first layer is computed if there are blocks. `target`
    may be the vector, so that w' changes last.
    """
    for level in reversed(range(len(layout.dense))):
        layer = layout.dense[level]
        before = layout.dense[level - 1].delta_dot if level > 0 else layout.features
        if before.size:
            multiply(program, layer.delta_dot, layer.weight, before)
            multiply(program, layer.delta, layer.weight.of(VECTOR), before, add=True)
        if level > 0:
            program.call(mask, layer.x.row, before.row)
        weight = layer.weight.of(TARGET)
        multiply(program, layer.delta_dot, layer.x, weight, transpose_a=True, add=True, scale=True)
        if layer.x_dot.size:
            multiply(program, layer.delta, layer.x_dot, weight, transpose_a=True, add=True, scale=True)
        program.call(add_rows, layer.delta_dot, layer.bias.of(TARGET))


def _labels(layout: Layout) -> View:
    return View(LABELS, 0, layout.examples, 1)
