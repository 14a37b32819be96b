"""The meta-gradient of one task: adapt, take the query gradient, carry the adjoint back.

The derivation and the references of the backward sweep are in `meta_gradient/checkpointed.py`.
"""

from typing import Any, NamedTuple

from maml_pipeline.meta_gradient.native.compiled import compiled, entry
from maml_pipeline.meta_gradient.native.gradients import (
    add_gradient,
    add_hessian_vector_product,
    predict,
)
from maml_pipeline.meta_gradient.native.products import copy, fill
from maml_pipeline.meta_gradient.native.schedule import (
    CURRENT,
    CURVATURE,
    KEPT,
    LOSS,
    OPERATION,
    QUERY,
    RECORD,
    SLOTS,
    SOURCE,
    STEP,
    TARGET,
    THETA,
)

TASKS_PER_GROUP = 2
"""Tasks whose meta-gradients are added up in one place: P / 2 numbers of memory for each task."""


class Examples(NamedTuple):
    """A support or query set.

    Args:
        inputs: `(S, features)`, or images as `(pixels, channels)`.
        labels: `(S,)` if the loss is the cross-entropy, otherwise empty.
        targets: `(S, outputs)` if it is the mean squared error, otherwise empty.
    """

    inputs: Any
    labels: Any
    targets: Any


class Work(NamedTuple):
    """Working memory for one task at a time; flat arrays, named by what they hold.

    Args:
        record: Record of the set at hand.
        kept: One row for each record that is kept.
        tangents: Record of tangents.
        u_dot: Tangent of u.
        z_gradient: Gradient by z; empty if no step is differentiated.
        columns: A part of columns.
        columns_dot: Its tangent.
        sums: Two weights.
        part: Two inputs or outputs of a fully connected layer, or z of a part of the pixels.
        features: Gradient by the features.
        prediction: Prediction of the support set.
        prediction_dot: Its tangent.
        delta_dot: Tangent of the gradient by the prediction, or by the input of a later layer.
        current: Parameters of the current step; may overlap `tangents`.
        checkpoints: One row for each parameter checkpoint.
        adjoint: The adjoint; empty if no step is differentiated.
    """

    record: Any
    kept: Any
    tangents: Any
    u_dot: Any
    z_gradient: Any
    columns: Any
    columns_dot: Any
    sums: Any
    part: Any
    features: Any
    prediction: Any
    prediction_dot: Any
    delta_dot: Any
    current: Any
    checkpoints: Any
    adjoint: Any


@compiled
def add_meta_gradient(
    layouts: Any,
    theta: Any,
    support: Examples,
    query: Examples,
    lr: float,
    instructions: Any,
    work: Work,
    query_prediction: Any,
    losses: Any,
    total: Any,
) -> None:
    """Add the meta-gradient of a task to `total`.

    Args:
        layouts: Layouts of the support and of the query set.
        theta: Initial parameters `(P,)`.
        support: Support set.
        query: Query set.
        lr: Inner learning rate alpha.
        instructions: See `schedule.py`.
        work: Working memory.
        query_prediction: Receives the prediction of the query set.
        losses: Receives the support loss before each step and, last, the query loss.
        total: Sum of meta-gradients.
    """
    is_first_order = work.adjoint.size == 0
    adjoint = total if is_first_order else work.adjoint
    nothing = total[:0]
    if not is_first_order:
        fill(work.adjoint, 0)
    for i in range(len(instructions)):
        operation, kept, loss = instructions[i, OPERATION], instructions[i, KEPT], instructions[i, LOSS]
        source = parameters_in(instructions[i, SOURCE], theta, work)
        record = work.kept[kept] if kept >= 0 else work.record
        if operation == CURVATURE:
            add_hessian_vector_product(layouts[0], source, adjoint, support, record, work, -lr, adjoint)
            continue
        is_query = operation == QUERY
        target = nothing
        if is_query:
            target = adjoint
        elif operation == STEP:
            target = parameters_in(instructions[i, TARGET], theta, work)
            if instructions[i, SOURCE] != instructions[i, TARGET]:
                copy(source, target)
        keeps_u = kept >= 0 or operation == RECORD
        value = add_gradient(
            layouts[1] if is_query else layouts[0],
            source,
            query if is_query else support,
            record,
            work,
            work.z_gradient if keeps_u else nothing,
            query_prediction if is_query else work.prediction,
            1.0 if is_query else -lr,
            target,
        )
        if loss >= 0:
            losses[loss] = value
    if not is_first_order:
        for i in range(len(total)):
            total[i] += adjoint[i]


@compiled
def parameters_in(slot: int, theta: Any, work: Work) -> Any:
    """Return the parameters in a slot."""
    if slot == THETA:
        return theta
    return work.current if slot == CURRENT else work.checkpoints[slot - SLOTS]


@entry
def add_meta_gradients(
    first_group: int,
    group_step: int,
    layouts: Any,
    theta: Any,
    support: Examples,
    query: Examples,
    lr: float,
    instructions: Any,
    work: Work,
    predictions: Any,
    losses: Any,
    totals: Any,
) -> None:
    """Add up the meta-gradients of every `group_step`-th group of tasks, from `first_group` on.

    The sum of each group is a row of `totals`, and does not depend on which thread computes it.
    """
    tasks = len(losses)
    for group in range(first_group, len(totals), group_step):
        fill(totals[group], 0)
        for task in range(group * TASKS_PER_GROUP, min((group + 1) * TASKS_PER_GROUP, tasks)):
            add_meta_gradient(
                layouts,
                theta,
                Examples(support.inputs[task], support.labels[task], support.targets[task]),
                Examples(query.inputs[task], query.labels[task], query.targets[task]),
                lr,
                instructions,
                work,
                predictions[task],
                losses[task],
                totals[group],
            )


@entry
def take_inner_steps(
    layout: Any, parameters: Any, support: Examples, lr: float, work: Work, losses: Any
) -> None:
    """Take one inner step with each task; row i of the parameters is task i's."""
    for task in range(len(parameters)):
        examples = Examples(support.inputs[task], support.labels[task], support.targets[task])
        theta = parameters[task]
        losses[task] = add_gradient(
            layout, theta, examples, work.record, work, work.z_gradient[:0], work.prediction, -lr, theta
        )


@entry
def predict_tasks(layout: Any, parameters: Any, inputs: Any, work: Work, predictions: Any) -> None:
    """Predict with the parameters of each task."""
    for task in range(len(parameters)):
        predict(layout, parameters[task], inputs[task], work.record, work, predictions[task])
