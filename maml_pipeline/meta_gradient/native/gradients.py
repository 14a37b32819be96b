"""The gradient of a set's loss, and the product of its Hessian with a vector, for several tasks.

The Hessian-vector product is forward over reverse: the tangents of all intermediate values as theta
moves along the vector, then the tangents of all gradients. Networks without blocks have functions of
their own, which compile faster.

References:
    Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
"""

from typing import Any

from maml_pipeline.meta_gradient.native.dense import (
    add_dense_curvature,
    add_dense_gradient,
    dense_tangents,
    dense_values,
    input_of,
)
from maml_pipeline.meta_gradient.native.layout import (
    DELTA,
    OUTPUTS,
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
