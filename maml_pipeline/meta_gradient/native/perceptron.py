"""Networks of fully connected layers alone: the whole inner loop of many tasks in one call.

A task of such a network takes microseconds, less than a call from Python, so that the instructions of
the method (`schedule.py`) are carried out here, task by task.
"""

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from maml_pipeline.meta_gradient.native.dense import (
    add_dense_curvature,
    add_dense_gradient,
    dense_tangents,
    dense_values,
    input_of,
)
from maml_pipeline.meta_gradient.native.examples import Examples
from maml_pipeline.meta_gradient.native.layout import OUTPUTS, Layout
from maml_pipeline.meta_gradient.native.losses import delta_tangent, loss_and_delta
from maml_pipeline.meta_gradient.native.numba_internals import compiled, entry_point, flat, matrix
from maml_pipeline.meta_gradient.native.products import copy, fill
from maml_pipeline.meta_gradient.native.schedule import (
    CURRENT,
    CURVATURE,
    KEPT,
    LOSS,
    OPERATION,
    QUERY,
    SLOTS,
    SOURCE,
    STEP,
    TARGET,
    THETA,
    Schedule,
)
from maml_pipeline.meta_gradient.native.work import Work, work_sizes

if TYPE_CHECKING:
    from maml_pipeline.meta_gradient.native.plan import Plan

PARTS = 10
(
    RECORD_NOT_KEPT,
    RECORDS_KEPT,
    TANGENTS,  # and before, the parameters of the current step
    CHECKPOINTS,
    ADJOINT,
    PREDICTION,
    SUMS,
    PART,
    PREDICTION_DOT,
    DELTA_DOT,
) = range(PARTS)
"""Parts of a thread's memory, which holds one task."""


def places(layouts: tuple[Layout, Layout], schedule: Schedule) -> Any:
    """Return where the parts of a thread's memory begin and, last, its size."""
    support, work = layouts[0], work_sizes(layouts, schedule.is_first_order)
    second = 0 if schedule.is_first_order else 1
    sizes = {
        RECORD_NOT_KEPT: max(layout.record for layout in layouts),
        RECORDS_KEPT: schedule.kept * support.record,
        TANGENTS: max(second * support.tangents, support.parameters),
        CHECKPOINTS: schedule.checkpoints * support.parameters,
        ADJOINT: second * support.parameters,
        PREDICTION: support.examples * int(support.dense[-1, OUTPUTS]),
        SUMS: work.sums,
        PART: work.part,
        PREDICTION_DOT: work.prediction_dot,
        DELTA_DOT: work.delta_dot,
    }
    return np.array([0, *accumulate(sizes[part] for part in range(PARTS))])


def meta_gradient(
    planned: "Plan",
    part: slice,
    theta: Any,
    support: Examples,
    query: Examples,
    lr: float,
    memory: Any,
    gradient: Any,
    predictions: Any,
    losses: Any,
) -> None:
    """Add up the meta-gradients of some of T tasks; see `chunk.meta_gradient`."""
    _meta_gradients(
        *(planned.layouts, planned.instructions, planned.places, memory, theta, lr, support, query),
        *(part.start, part.stop, gradient, predictions, losses),
    )


def curves(
    planned: "Plan",
    part: slice,
    theta: Any,
    support: Examples,
    queries: list[Any],
    lr: float,
    memory: Any,
    adapted: Any,
    predictions: Any,
) -> None:
    """Adapt some of T tasks and predict before each inner step; see `chunk.curves`."""
    stacked = np.stack(queries) if queries else np.empty((0, *support.inputs.shape), theta.dtype)
    _curves(
        *(planned.layouts, planned.places, memory, theta, lr, support, stacked),
        *(part.start, part.stop, adapted, predictions),
    )


@entry_point
def _meta_gradients(
    layouts: Any,
    instructions: Any,
    places: Any,
    memory: Any,
    theta: Any,
    lr: float,
    support: Any,
    query: Any,
    first: int,
    end: int,
    gradient: Any,
    predictions: Any,
    losses: Any,
) -> None:
    """Compute `meta_gradient` of the tasks from the first one to the one before the end."""
    work, own = _work(places, memory), _part(memory, places, ADJOINT)
    adjoint = own if len(own) > 0 else gradient
    for task in range(first, end):
        fill(own, 0)
        for n in range(len(instructions)):
            instruction = instructions[n]
            operation, loss = instruction[OPERATION], instruction[LOSS]
            at = _parameters(memory, places, theta, instruction[SOURCE])
            record = _record(memory, places, layouts[0], instruction[KEPT])
            if operation == CURVATURE:
                tangents = _part(memory, places, TANGENTS)
                dense_tangents(layouts[0], at, adjoint, record, tangents, work)
                delta_tangent(layouts[0], record, support[1][task], work)
                add_dense_curvature(layouts[0], at, adjoint, record, tangents, work, -lr, adjoint)
                continue
            layout, examples, factor, target = layouts[0], support, -lr, adjoint[:0]
            prediction = _prediction(memory, places, layouts[0])
            if operation == QUERY:
                layout, examples, factor, target = layouts[1], query, 1.0, adjoint
                prediction = predictions[task]
            elif operation == STEP:
                target = _parameters(memory, places, theta, instruction[TARGET])
                if instruction[TARGET] != instruction[SOURCE]:
                    copy(at, target)
            value = _add_gradient(layout, at, examples, task, record, work, prediction, factor, target)
            if loss >= 0:
                losses[loss, task] = value
        for i in range(len(own)):
            gradient[i] += own[i]


@entry_point
def _curves(
    layouts: Any,
    places: Any,
    memory: Any,
    theta: Any,
    lr: float,
    support: Any,
    queries: Any,
    first: int,
    end: int,
    adapted: Any,
    predictions: Any,
) -> None:
    """Compute `curves` of the tasks from the first one to the one before the end."""
    work, record = _work(places, memory), _record(memory, places, layouts[0], -1)
    for task in range(first, end):
        own = adapted[task]
        copy(theta, own)
        for step in range(len(predictions)):
            for query in range(len(queries)):
                copy(flat(queries[query, task]), flat(input_of(layouts[1], record)))
                dense_values(layouts[1], own, record, predictions[step, query, task])
            prediction = _prediction(memory, places, layouts[0])
            _add_gradient(layouts[0], own, support, task, record, work, prediction, -lr, own)


@compiled
def _add_gradient(
    layout: Any,
    theta: Any,
    examples: Any,
    task: int,
    record: Any,
    work: Any,
    prediction: Any,
    factor: float,
    target: Any,
) -> float:
    """Add `factor` times the gradient of a task's loss to `target`, and return the loss."""
    inputs, labels, values = examples
    copy(flat(inputs[task]), flat(input_of(layout, record)))
    dense_values(layout, theta, record, prediction)
    loss = loss_and_delta(layout, record, prediction, labels[task], values[task])
    add_dense_gradient(layout, theta, record, work, factor, target)
    return loss  # type: ignore[no-any-return]


@compiled
def _part(memory: Any, places: Any, which: int) -> Any:
    """View a part of the memory."""
    return memory[places[which] : places[which + 1]]


@compiled
def _parameters(memory: Any, places: Any, theta: Any, slot: int) -> Any:
    """View the parameters in a slot."""
    if slot == THETA:
        return theta
    start = places[TANGENTS] if slot == CURRENT else places[CHECKPOINTS] + (slot - SLOTS) * len(theta)
    return memory[start : start + len(theta)]


@compiled
def _record(memory: Any, places: Any, support: Any, kept: int) -> Any:
    """View a kept record, or the one that is not kept if `kept` is negative."""
    if kept < 0:
        return _part(memory, places, RECORD_NOT_KEPT)
    start = places[RECORDS_KEPT] + kept * support.record
    return memory[start : start + support.record]


@compiled
def _prediction(memory: Any, places: Any, support: Any) -> Any:
    """View the prediction of a support set."""
    return matrix(memory, places[PREDICTION], support.examples, support.dense[-1, OUTPUTS])


@compiled
def _work(places: Any, memory: Any) -> Any:
    """View the working memory of the functions of `dense.py`."""
    none = memory[:0]
    return Work(
        none,
        _part(memory, places, SUMS),
        none,
        none,
        none,
        _part(memory, places, PART),
        _part(memory, places, PREDICTION_DOT),
        _part(memory, places, DELTA_DOT),
    )
