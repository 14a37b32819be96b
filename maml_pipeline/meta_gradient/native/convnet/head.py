"""The head, prediction = x w^T + b, the loss, and the derivatives of both, as calls of kernels.

A prime marks a tangent, as in `normalisation.py`.
"""

from maml_pipeline.meta_gradient.native.convnet import losses
from maml_pipeline.meta_gradient.native.convnet.kernels import (
    LABELS,
    LOSS,
    PREDICTION,
    TARGET,
    VALUES,
    VECTOR,
    Program,
    View,
)
from maml_pipeline.meta_gradient.native.convnet.layout import ConvNetLayout
from maml_pipeline.meta_gradient.native.convnet.products import (
    add_rows,
    add_scaled,
    add_to_rows,
    multiply,
)


def head(program: Program, layout: ConvNetLayout) -> None:
    """Append the prediction."""
    prediction = layout.delta.start_of(PREDICTION)
    multiply(program, layout.x, layout.weight, prediction, transpose_b=True)
    program.call(add_to_rows, layout.bias, prediction)


def head_gradient(program: Program, layout: ConvNetLayout, has_target: bool) -> None:
    """Append the loss, delta and the gradient by x, and `target` += factor times that by w and b.

    `target` may be theta, so it changes last.
    """
    prediction, loss = layout.delta.start_of(PREDICTION), View(LOSS, 0, 1, 1)
    if layout.classifies:
        program.call(losses.cross_entropy, prediction, layout.delta, loss, _labels(layout))
    else:
        values = layout.delta.start_of(VALUES)
        program.call(losses.squared_error, prediction, values, layout.delta, loss)
    multiply(program, layout.delta, layout.weight, layout.features)
    if has_target:
        total = layout.weight_sum.matrix(layout.weight.rows, layout.weight.columns)
        multiply(program, layout.delta, layout.x, total, transpose_a=True)
        program.call(add_scaled, total, layout.weight.of(TARGET))
        program.call(add_rows, layout.delta, layout.bias.of(TARGET))


def head_tangents(program: Program, layout: ConvNetLayout) -> None:
    """Append prediction' = x w'^T + x' w^T + b', and delta'."""
    prediction_dot = layout.prediction_dot
    multiply(program, layout.x, layout.weight.of(VECTOR), prediction_dot, transpose_b=True)
    multiply(program, layout.x_dot, layout.weight, prediction_dot, transpose_b=True, add=True)
    program.call(add_to_rows, layout.bias.of(VECTOR), prediction_dot)
    if layout.classifies:
        operands = layout.delta, prediction_dot, layout.delta_dot, _labels(layout)
        program.call(losses.cross_entropy_tangent, *operands)
    else:
        program.call(losses.squared_error_tangent, prediction_dot, layout.delta_dot)


def head_curvature(program: Program, layout: ConvNetLayout) -> None:
    """Append (d/dx)' = delta' w + delta w', and `target` += factor times (d/dw)' and (d/db)'.

    `target` may be the vector, so it changes last.
    """
    multiply(program, layout.delta_dot, layout.weight, layout.features)
    multiply(program, layout.delta, layout.weight.of(VECTOR), layout.features, add=True)
    total = layout.weight_sum.matrix(layout.weight.rows, layout.weight.columns)
    multiply(program, layout.delta_dot, layout.x, total, transpose_a=True)
    multiply(program, layout.delta, layout.x_dot, total, transpose_a=True, add=True)
    program.call(add_scaled, total, layout.weight.of(TARGET))
    program.call(add_rows, layout.delta_dot, layout.bias.of(TARGET))


def _labels(layout: ConvNetLayout) -> View:
    return View(LABELS, 0, layout.delta.rows, 1)
