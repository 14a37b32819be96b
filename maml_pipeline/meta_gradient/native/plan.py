"""What is the same in every meta-step: the job of each task, and the memory of a thread."""

from functools import lru_cache
from typing import NamedTuple

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.native.job import Job, Place
from maml_pipeline.meta_gradient.native.kernels import TARGET, THETA, Arrays, Kernel, Program, View
from maml_pipeline.meta_gradient.native.layout import Layout, layout_of
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.products import add_scaled, clear, copy
from maml_pipeline.meta_gradient.native.programs import (
    curvature_program,
    gradient_program,
    prediction_program,
)
from maml_pipeline.meta_gradient.native.schedule import (
    CURRENT,
    CURVATURE,
    INITIAL,
    QUERY,
    RECORD,
    SLOTS,
    STEP,
    schedule,
)

BYTES_OF_LABEL = 8

TASKS_PER_CHUNK = 32
"""For networks without blocks, where a call takes as long as several tasks."""

(MEMORY, THETA_0, SUPPORT_X, SUPPORT_Y, RESULT, PREDICTIONS, QUERY_X, QUERY_Y, LOSSES) = range(9)
"""Regions of a job: a thread's memory; the initial parameters; the support sets; the sums of the chunks'
meta-gradients, or the adapted parameters; the predictions; the query sets; and the losses. A job of
curves has the inputs of any number of sets from `QUERY_X` on, and no others."""


class Sets(NamedTuple):
    """The kind of tasks.

    Args:
        support: Shape of the inputs of a support set, `(S, ...)`.
        query: Shape of the inputs of a set that is predicted, `(Q, ...)`.
        tasks: Number of tasks T.
        classifies: The loss is the cross-entropy, otherwise the mean squared error.
        bytes_each: Bytes of a number.
    """

    support: tuple[int, ...]
    query: tuple[int, ...]
    tasks: int
    classifies: bool
    bytes_each: int


class Plan(NamedTuple):
    """How a batch of T tasks is computed.

    Args:
        job: What each task runs.
        chunks: The tasks of each chunk: one if the network has blocks.
        memory: Numbers in a thread's memory, which holds one task.
    """

    job: Job
    chunks: tuple[slice, ...]
    memory: int


class _Memory:
    """Hands out parts of a thread's memory."""

    def __init__(self, bytes_each: int) -> None:
        self.bytes_each, self.size = bytes_each, 0

    def take(self, size: int) -> Place:
        start = self.size
        self.size += size
        return Place(MEMORY, self.bytes_each * start)


@lru_cache(maxsize=64)
def meta_gradient_plan(network: FeedForward, sets: Sets, method: Method, steps: int, first: int) -> Plan:
    """Plan a meta-gradient.

    Args:
        network: The network.
        sets: The kind of tasks.
        method: Unrolled or checkpointed.
        steps: Number of inner steps k.
        first: The first differentiated step; k for first order.
    """
    support, query = _layouts(network, sets)
    planned, memory, each = schedule(method, steps, first), _Memory(sets.bytes_each), sets.bytes_each
    is_first_order, parameters = planned.is_first_order, support.parameters
    own_work = support.first_order_work if is_first_order else support.second_order_work
    work = memory.take(max(own_work, query.first_order_work))
    record = memory.take(max(support.record, query.record))
    kept = [memory.take(support.record) for _ in range(planned.kept)]
    # The parameters of the current step, and later tangents.
    current = memory.take(max(0 if is_first_order else support.tangents, parameters))
    slots = {INITIAL: Place(THETA_0), CURRENT: current}
    slots |= {SLOTS + i: memory.take(parameters) for i in range(planned.checkpoints)}
    prediction, loss = memory.take(support.examples * support.outputs), memory.take(1)
    result = Place(RESULT, each_chunk=each * parameters)
    adjoint = result if is_first_order else memory.take(parameters)

    job, of_support = Job(), Arrays(**_examples(support, SUPPORT_X, SUPPORT_Y, each))
    if not is_first_order:
        job.step(_clear(support), Arrays(target=adjoint))
    for operation, source, target, keeps, loss_number in planned.instructions:
        places = of_support._replace(
            theta=slots[source],
            record=record if keeps < 0 else kept[keeps],
            work=work,
            prediction=prediction,
            loss=loss,
        )
        if loss_number >= 0:
            places = places._replace(loss=Place(LOSSES, loss_number * sets.tasks * each, each))
        if operation == CURVATURE:
            places = places._replace(vector=adjoint, target=adjoint, tangents=current)
            job.step(curvature_program(support), places, descends=True)
        elif operation == RECORD:
            job.step(gradient_program(support, keeps_u=True, has_target=False), places)
        elif operation == STEP:
            if source != target:
                job.step(_copy(support), Arrays(theta=slots[source], target=slots[target]))
            program = gradient_program(support, keeps_u=keeps >= 0, has_target=True)
            job.step(program, places._replace(target=slots[target]), descends=True)
        elif operation == QUERY:
            predicted = Place(PREDICTIONS, each_task=each * query.examples * query.outputs)
            of_query = _examples(query, QUERY_X, QUERY_Y, each)
            places = places._replace(**of_query, prediction=predicted, target=adjoint)
            job.step(gradient_program(query, keeps_u=False, has_target=True), places)
    if not is_first_order:
        job.step(_add(support), Arrays(theta=adjoint, target=result))
    return Plan(job, _chunks(network, sets), memory.size)


@lru_cache(maxsize=64)
def curves_plan(network: FeedForward, sets: Sets, steps: int, number: int) -> Plan:
    """Plan the predictions before each inner step, and the adapted parameters after the last one.

    Args:
        network: The network.
        sets: The kind of tasks; the query sets are those that are predicted.
        steps: Number of inner steps k.
        number: Number of sets that are predicted.
    """
    support, query = _layouts(network, sets)
    memory, each = _Memory(sets.bytes_each), sets.bytes_each
    work = memory.take(max(support.first_order_work, query.first_order_work))
    record = memory.take(max(support.record, query.record))
    prediction, loss = memory.take(support.examples * support.outputs), memory.take(1)
    adapted = Place(RESULT, each_task=each * support.parameters)

    job = Job()
    job.step(_copy(support), Arrays(theta=Place(THETA_0), target=adapted))
    common = Arrays(theta=adapted, target=adapted, record=record, work=work)
    of_task = each * query.examples * query.outputs
    descent = common._replace(
        **_examples(support, SUPPORT_X, SUPPORT_Y, each), prediction=prediction, loss=loss
    )
    for t in range(steps):
        for i in range(number):
            predicted = Place(PREDICTIONS, (t * number + i) * sets.tasks * of_task, of_task)
            images = _examples(query, QUERY_X + i, SUPPORT_Y, each)["images"]
            job.step(prediction_program(query), common._replace(images=images, prediction=predicted))
        job.step(gradient_program(support, keeps_u=False, has_target=True), descent, descends=True)
    return Plan(job, _chunks(network, sets), memory.size)


@lru_cache(maxsize=64)
def losses_plan(network: FeedForward, sets: Sets) -> Plan:
    """Plan the losses of the support sets at parameters of each task, and their gradients.

    Args:
        network: The network.
        sets: The kind of tasks.
    """
    layout, _ = _layouts(network, sets)
    memory, each = _Memory(sets.bytes_each), sets.bytes_each
    work, record = memory.take(layout.first_order_work), memory.take(layout.record)
    result = Place(RESULT, each_task=each * layout.parameters)
    job = Job()
    job.step(_clear(layout), Arrays(target=result))
    places = Arrays(
        **_examples(layout, SUPPORT_X, SUPPORT_Y, each),
        theta=Place(THETA_0, each_task=each * layout.parameters),
        target=result,
        record=record,
        work=work,
        prediction=Place(PREDICTIONS, each_task=each * layout.examples * layout.outputs),
        loss=Place(LOSSES, each_task=each),
    )
    job.step(gradient_program(layout, keeps_u=False, has_target=True), places)
    return Plan(job, _chunks(network, sets), memory.size)


def _layouts(network: FeedForward, sets: Sets) -> tuple[Layout, Layout]:
    support, query = (
        layout_of(network, shape, sets.bytes_each, sets.classifies)
        for shape in (sets.support, sets.query)
    )
    return support, query


def _chunks(network: FeedForward, sets: Sets) -> tuple[slice, ...]:
    size = 1 if network.blocks else TASKS_PER_CHUNK
    starts = range(0, sets.tasks, size)
    return tuple(slice(start, min(start + size, sets.tasks)) for start in starts)


def _examples(layout: Layout, inputs: int, targets: int, each: int) -> dict[str, Place]:
    """Return the places of the inputs and targets of a set, in regions of these numbers."""
    labels = Place(targets, each_task=BYTES_OF_LABEL * layout.examples)
    values = Place(targets, each_task=each * layout.examples * layout.outputs)
    return {
        "images": Place(inputs, each_task=each * layout.inputs),
        "labels": labels,
        "values": values,
    }


def _copy(layout: Layout) -> Program:
    return _of_parameters(copy, layout, THETA, TARGET)


def _clear(layout: Layout) -> Program:
    return _of_parameters(clear, layout, TARGET)


def _add(layout: Layout) -> Program:
    return _of_parameters(add_scaled, layout, THETA, TARGET)


def _of_parameters(kernel: Kernel, layout: Layout, *arrays: int) -> Program:
    """Return a program that calls a kernel with vectors of parameters."""
    program = Program(layout.dtype)
    program.call(kernel, *(View(array, 0, 1, layout.parameters) for array in arrays))
    return program
