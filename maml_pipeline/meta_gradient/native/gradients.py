"""The gradient of a set's loss, and the product of its Hessian with a vector, for several tasks.

The Hessian-vector product is forward over reverse: the tangents of all intermediate values as theta
moves along the vector, then the tangents of all gradients. Networks without blocks have functions of
their own, which compile faster.

References:
    Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.convolution import (
    add_block_curvature,
    add_block_gradient,
    block_tangents,
    block_values,
    norm_of,
    outputs_of,
)
from maml_pipeline.meta_gradient.native.dense import (
    add_dense_curvature,
    add_dense_gradient,
    dense_tangents,
    dense_values,
    input_of,
)
from maml_pipeline.meta_gradient.native.features import (
    feature_gradient,
    feature_tangents,
    feature_values,
)
from maml_pipeline.meta_gradient.native.layout import (
    DELTA,
    INPUTS,
    NORM,
    NORM_DOT,
    OUTPUTS,
    PEAKS,
    PEAKS_DOT,
    X_DOT,
    U,
)
from maml_pipeline.meta_gradient.native.losses import gradient_tangent, loss_and_gradient
from maml_pipeline.meta_gradient.native.numba_internals import compiled, entry_point, matrix
from maml_pipeline.meta_gradient.native.products import copy


@compiled
def row_of(rows: Any, task: int) -> Any:
    """Return a task's row, or the only one, which all tasks share."""
    return rows[task if len(rows) > 1 else 0]


# Networks of fully connected layers ------------------------------------------------------------------


@entry_point
def dense_predictions(
    layout: Any, parameters: Any, inputs: Any, records: Any, work: Any, predictions: Any
) -> None:
    """Compute `predictions` of a network without blocks."""
    for task in range(len(predictions)):
        record = row_of(records, task)
        copy(inputs[task].ravel(), input_of(layout, record).ravel())
        dense_values(layout, row_of(parameters, task), record, predictions[task])


@entry_point
def add_dense_gradients(
    layout: Any,
    parameters: Any,
    inputs: Any,
    labels: Any,
    values: Any,
    records: Any,
    keeps_u: bool,
    work: Any,
    predictions: Any,
    losses: Any,
    factor: float,
    targets: Any,
) -> None:
    """Compute `add_gradients` of a network without blocks."""
    for task in range(len(predictions)):
        theta, record = row_of(parameters, task), row_of(records, task)
        copy(inputs[task].ravel(), input_of(layout, record).ravel())
        dense_values(layout, theta, record, predictions[task])
        losses[task] = loss_and_delta(layout, record, predictions[task], labels[task], values[task])
        add_dense_gradient(layout, theta, record, work, factor, row_of(targets, task))


@entry_point
def add_dense_curvatures(
    layout: Any,
    parameters: Any,
    vectors: Any,
    inputs: Any,
    labels: Any,
    records: Any,
    tangents: Any,
    work: Any,
    factor: float,
    targets: Any,
) -> None:
    """Compute `add_curvatures` of a network without blocks."""
    for task in range(len(vectors)):
        theta, record, vector = row_of(parameters, task), row_of(records, task), vectors[task]
        dense_tangents(layout, theta, vector, record, tangents, work)
        delta_tangent(layout, record, labels[task], work)
        add_dense_curvature(layout, theta, vector, record, tangents, work, factor, targets[task])


# Networks of blocks and fully connected layers -------------------------------------------------------


@entry_point
def predictions(
    layout: Any, parameters: Any, inputs: Any, records: Any, work: Any, predictions: Any
) -> None:
    """Predict each task's inputs with its parameters.

    Args:
        layout: Layout of the set.
        parameters: `(T, P)`, or `(1, P)` if the tasks share them.
        inputs: `(T, S, features)`, or images as `(T, pixels, channels)`.
        records: Receive the intermediate values: `(T, size)`, or `(1, size)` if none is kept.
        work: Working memory.
        predictions: Receive the predictions `(T, S, outputs)`.
    """
    for task in range(len(predictions)):
        record = row_of(records, task)
        network_values(layout, row_of(parameters, task), inputs[task], record, work, predictions[task])


@entry_point
def add_gradients(
    layout: Any,
    parameters: Any,
    inputs: Any,
    labels: Any,
    values: Any,
    records: Any,
    keeps_u: bool,
    work: Any,
    predictions: Any,
    losses: Any,
    factor: float,
    targets: Any,
) -> None:
    """Add `factor` times the gradient of each task's loss to the task's target.

    Args:
        layout: Layout of the set.
        parameters: `(T, P)`, or `(1, P)` if the tasks share them.
        inputs: `(T, S, features)`, or images as `(T, pixels, channels)`.
        labels: `(T, S)` for the cross-entropy, otherwise `(T, 0)`.
        values: `(T, S, outputs)` for the mean squared error, otherwise `(T, 0, 0)`.
        records: Receive the intermediate values: `(T, size)`, or `(1, size)` if none is kept.
        keeps_u: Keep u in the record, for `add_curvatures`.
        work: Working memory.
        predictions: Receive the predictions `(T, S, outputs)`.
        losses: Receive the losses `(T,)`.
        factor: A number.
        targets: `(T, P)`; `(1, P)` to sum over tasks; `(1, 0)` if only the records are wanted.
            Parameters that are their own target take a gradient step.
    """
    for task in range(len(predictions)):
        theta, record, target = row_of(parameters, task), row_of(records, task), row_of(targets, task)
        network_values(layout, theta, inputs[task], record, work, predictions[task])
        losses[task] = loss_and_delta(layout, record, predictions[task], labels[task], values[task])
        add_dense_gradient(layout, theta, record, work, factor, target)
        block = layout.blocks[-1]
        feature_gradient(layout, work.features, outputs_of(block, record, block[U]))
        for level in range(len(layout.blocks) - 1, -1, -1):
            add_block_gradient(layout, level, theta, inputs[task], record, keeps_u, work, factor, target)


@entry_point
def add_curvatures(
    layout: Any,
    parameters: Any,
    vectors: Any,
    inputs: Any,
    labels: Any,
    records: Any,
    tangents: Any,
    work: Any,
    factor: float,
    targets: Any,
) -> None:
    """Add `factor` times the product of each task's Hessian with its vector to the task's target.

    Args:
        layout: Layout of the set.
        parameters: `(T, P)`, or `(1, P)` if the tasks share them.
        vectors: `(T, P)`.
        inputs: As for `add_gradients`.
        labels: As for `add_gradients`.
        records: The records of `add_gradients` at the parameters, with u. Overwritten.
        tangents: Working memory for a record of tangents.
        work: Working memory.
        factor: A number.
        targets: `(T, P)`; may be the vectors.
    """
    for task in range(len(vectors)):
        theta, record, vector = row_of(parameters, task), row_of(records, task), vectors[task]
        for level in range(len(layout.blocks)):
            block_tangents(layout, level, theta, vector, inputs[task], record, tangents, work)
        block = layout.blocks[-1]
        feature_tangents(
            layout,
            outputs_of(block, record, block[PEAKS]),
            outputs_of(block, tangents, block[PEAKS_DOT]),
            norm_of(block, record, block[NORM]),
            norm_of(block, tangents, block[NORM_DOT]),
            matrix(tangents, layout.dense[0, X_DOT], layout.examples, layout.dense[0, INPUTS]),
        )
        dense_tangents(layout, theta, vector, record, tangents, work)
        delta_tangent(layout, record, labels[task], work)
        add_dense_curvature(layout, theta, vector, record, tangents, work, factor, targets[task])
        feature_gradient(layout, work.features, outputs_of(block, work.u_dot, 0))
        for level in range(len(layout.blocks) - 1, -1, -1):
            add_block_curvature(
                layout, level, theta, vector, inputs[task], record, tangents, work, factor, targets[task]
            )


@compiled
def network_values(
    layout: Any, theta: Any, images: Any, record: Any, work: Any, prediction: Any
) -> None:
    """Compute the intermediate values and the prediction of a network with blocks."""
    for level in range(len(layout.blocks)):
        block_values(layout, level, theta, images, record, work)
    block = layout.blocks[-1]
    peaks, norm = outputs_of(block, record, block[PEAKS]), norm_of(block, record, block[NORM])
    feature_values(layout, peaks, norm, input_of(layout, record))
    dense_values(layout, theta, record, prediction)


@compiled
def loss_and_delta(layout: Any, record: Any, prediction: Any, labels: Any, values: Any) -> float:
    """Compute the loss, and its gradient by the prediction in the record."""
    last = layout.dense[-1]
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    return loss_and_gradient(layout.classifies, prediction, labels, values, delta)  # type: ignore[no-any-return]


@compiled
def delta_tangent(layout: Any, record: Any, labels: Any, work: Any) -> None:
    """Compute the tangent of the gradient by the prediction."""
    last = layout.dense[-1]
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    prediction_dot = matrix(work.prediction_dot, 0, layout.examples, last[OUTPUTS])
    delta_dot = matrix(work.delta_dot, 0, layout.examples, last[OUTPUTS])
    gradient_tangent(layout.classifies, delta, labels, prediction_dot, delta_dot)
