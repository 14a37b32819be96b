"""The gradient of a set's loss, and the product of its Hessian with a vector.

The Hessian-vector product is forward over reverse: the tangents of all intermediate values as theta moves
along the vector, then the tangents of all gradients.

References:
    Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.compiled import compiled
from maml_pipeline.meta_gradient.native.convolution import (
    block_curvature,
    block_gradient,
    block_tangents,
    block_values,
    norm_of,
    pixels_of,
)
from maml_pipeline.meta_gradient.native.dense import (
    dense_curvature,
    dense_gradient,
    dense_tangents,
    dense_values,
)
from maml_pipeline.meta_gradient.native.features import feature_gradient, feature_tangents, feature_values
from maml_pipeline.meta_gradient.native.layout import (
    DELTA,
    INPUTS,
    NORM,
    NORM_DOT,
    OUTPUTS,
    U,
    X,
    X_DOT,
    Z,
    Z_DOT,
)
from maml_pipeline.meta_gradient.native.losses import gradient_tangent, loss_and_gradient
from maml_pipeline.meta_gradient.native.products import copy, matrix


@compiled
def predict(layout: Any, theta: Any, inputs: Any, record: Any, work: Any, prediction: Any) -> None:
    """Compute the prediction `(S, outputs)`; the record keeps what the gradient needs."""
    x = matrix(record, layout.dense[0, X], layout.examples, layout.dense[0, INPUTS])
    if len(layout.blocks) == 0:
        copy(inputs.ravel(), x.ravel())
    else:
        for level in range(len(layout.blocks)):
            block_values(layout, level, theta, inputs, record, work.columns)
        block = layout.blocks[-1]
        feature_values(
            layout, pixels_of(block, record, block[Z]), norm_of(block, record, block[NORM]), x
        )
    dense_values(layout, theta, record, prediction)


@compiled
def add_gradient(
    layout: Any,
    theta: Any,
    examples: Any,
    record: Any,
    work: Any,
    z_gradient: Any,
    prediction: Any,
    factor: float,
    target: Any,
) -> float:
    """Add `factor` times the gradient of the loss at theta to `target`, and return the loss.

    Args:
        layout: Layout of the set.
        theta: Parameters.
        examples: Inputs, labels and targets.
        record: Receives the intermediate values.
        work: Working memory.
        z_gradient: Working memory for the gradient by z; without elements, it overwrites u in the record.
        prediction: Receives the prediction.
        factor: A number.
        target: Where the gradient is added; may be theta, which then takes a gradient step, or without
            elements: then only the record is wanted.
    """
    predict(layout, theta, examples.inputs, record, work, prediction)
    last = layout.dense[-1]
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    loss = loss_and_gradient(layout.classifies, prediction, examples.labels, examples.targets, delta)
    has_blocks = len(layout.blocks) > 0
    inputs = layout.dense[0, INPUTS] if has_blocks else 0
    x_gradient = matrix(work.features, 0, layout.examples, inputs)
    dense_gradient(layout, theta, record, x_gradient, work.sums, factor, target)
    if has_blocks:
        block = layout.blocks[-1]
        feature_gradient(layout, x_gradient, pixels_of(block, record, block[U]))
    for level in range(len(layout.blocks) - 1, -1, -1):
        block_gradient(
            layout, level, theta, examples.inputs, record, z_gradient, work.columns, work.sums, factor, target,
        )
    return loss  # type: ignore[no-any-return]


@compiled
def add_hessian_vector_product(
    layout: Any, theta: Any, vector: Any, examples: Any, record: Any, work: Any, factor: float, target: Any
) -> None:
    """Add `factor` times the product of the loss's Hessian at theta with a vector to `target`.

    Args:
        layout: Layout of the set.
        theta: Parameters.
        vector: A vector of the same size.
        examples: Inputs, labels and targets.
        record: The record of `add_gradient` at theta, with u. Overwritten.
        work: Working memory.
        factor: A number.
        target: Where the product is added; may be the vector.
    """
    tangents, last = work.tangents, layout.dense[-1]
    for level in range(len(layout.blocks)):
        block_tangents(
            layout, level, theta, vector, examples.inputs, record, tangents, work.columns, work.columns_dot, work.part,
        )
    x_dot = matrix(tangents, layout.dense[0, X_DOT], layout.examples, layout.dense[0, INPUTS])
    if len(layout.blocks) > 0:
        block = layout.blocks[-1]
        feature_tangents(
            layout,
            pixels_of(block, record, block[Z]),
            pixels_of(block, tangents, block[Z_DOT]),
            norm_of(block, record, block[NORM]),
            norm_of(block, tangents, block[NORM_DOT]),
            x_dot,
        )
    prediction_dot = matrix(work.prediction_dot, 0, layout.examples, last[OUTPUTS])
    dense_tangents(layout, theta, vector, record, tangents, work.part, prediction_dot)
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    delta_dot = matrix(work.delta_dot, 0, layout.examples, last[OUTPUTS])
    gradient_tangent(layout.classifies, delta, examples.labels, prediction_dot, delta_dot)
    inputs = layout.dense[0, INPUTS] if len(layout.blocks) > 0 else 0
    x_gradient_dot = matrix(work.features, 0, layout.examples, inputs)
    dense_curvature(
            layout, theta, vector, record, tangents, work.delta_dot, work.part, x_gradient_dot, work.sums, factor, target,
    )
    if len(layout.blocks) > 0:
        block = layout.blocks[-1]
        feature_gradient(layout, x_gradient_dot, pixels_of(block, work.u_dot, 0))
    for level in range(len(layout.blocks) - 1, -1, -1):
        block_curvature(
            layout, level, theta, vector, examples.inputs, record, tangents, work.u_dot, work.columns, work.columns_dot, work.sums, factor, target,
        )
