"""What a network of blocks computes for several tasks, one after the other."""

from typing import Any

from maml_pipeline.meta_gradient.native.convnet.kernels import Arrays
from maml_pipeline.meta_gradient.native.convnet.layout import ConvNetLayout
from maml_pipeline.meta_gradient.native.convnet.programs import (
    curvature_program,
    gradient_program,
    prediction_program,
)


def predictions(
    layout: ConvNetLayout, parameters: Any, inputs: Any, records: Any, work: Any, predictions: Any
) -> None:
    """Predict each task's images with its parameters.

    Args:
        layout: Layout of the set.
        parameters: `(T, P)`, or `(1, P)` if the tasks share them.
        inputs: Images `(T, pixels, channels)`.
        records: Receive the intermediate values: `(T, size)`, or `(1, size)` if none is kept.
        work: Working memory.
        predictions: Receive the predictions `(T, S, outputs)`.
    """
    program = prediction_program(layout)
    for task in range(len(predictions)):
        program.run(
            Arrays(
                theta=_row(parameters, task),
                images=inputs[task],
                record=_row(records, task),
                work=work,
                prediction=predictions[task],
            )
        )


def add_gradients(
    layout: ConvNetLayout,
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
        inputs: Images `(T, pixels, channels)`.
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
    program = gradient_program(layout, keeps_u, targets.size > 0)
    for task in range(len(predictions)):
        arrays = Arrays(
            theta=_row(parameters, task),
            target=_row(targets, task),
            images=inputs[task],
            labels=labels[task],
            values=values[task],
            record=_row(records, task),
            work=work,
            prediction=predictions[task],
            loss=losses[task : task + 1],
        )
        program.run(arrays, factor)


def add_curvatures(
    layout: ConvNetLayout,
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
    program = curvature_program(layout)
    for task in range(len(vectors)):
        arrays = Arrays(
            theta=_row(parameters, task),
            vector=vectors[task],
            target=targets[task],
            images=inputs[task],
            labels=labels[task],
            record=_row(records, task),
            tangents=tangents,
            work=work,
        )
        program.run(arrays, factor)


def _row(rows: Any, task: int) -> Any:
    """Return a task's row, or the only one, which all tasks share."""
    return rows[task if len(rows) > 1 else 0]
