"""One chunk of tasks of a network with blocks: the instructions of a meta-gradient, carried out.

Nothing is allocated here: other threads carry out other chunks, each with memory of its own.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from maml_pipeline.meta_gradient.native.convnet import entry_points
from maml_pipeline.meta_gradient.native.examples import Examples
from maml_pipeline.meta_gradient.native.schedule import (
    CURRENT,
    CURVATURE,
    QUERY,
    RECORD,
    SLOTS,
    STEP,
    THETA,
)

if TYPE_CHECKING:
    from maml_pipeline.meta_gradient.native.plan import Plan


class Memory(NamedTuple):
    """Memory of a thread for a chunk of C tasks; records are rows, see `convnet/layout.py`.

    Args:
        work: Working memory of the compiled functions.
        records: `(C, size)`, or `(1, size)` if none is read again.
        kept: `(kept records, C, size)`.
        tangents: A record of tangents.
        current: Parameters of the current step `(C, P)`; overlaps `tangents`, which are used later.
        checkpoints: Parameters that the sweep needs again `(checkpoints, C, P)`.
        adjoints: `(C, P)`, or empty in first order.
        predictions: Predictions of the support sets `(C, S, outputs)`.
        losses: Losses `(C,)`.
    """

    work: Any
    records: Any
    kept: Any
    tangents: Any
    current: Any
    checkpoints: Any
    adjoints: Any
    predictions: Any
    losses: Any


def meta_gradient(
    planned: "Plan",
    part: slice,
    theta: Any,
    support: Examples,
    query: Examples,
    lr: float,
    memory: Memory,
    gradient: Any,
    predictions: Any,
    losses: Any,
) -> None:
    """Add up the meta-gradients of some of T tasks.

    Args:
        planned: Layouts and instructions.
        part: The tasks.
        theta: Initial parameters `(P,)`.
        support: Support sets.
        query: Query sets.
        lr: Inner learning rate alpha.
        memory: Memory of the thread.
        gradient: Receives the sum of the meta-gradients `(P,)`. Zero before.
        predictions: Receive the predictions of the query sets `(T, Q, outputs)`.
        losses: Receive the losses `(k + 1, T)`: of the support sets before each inner step and, last, of
            the query sets.
    """
    support, query, tasks = support.tasks(part), query.tasks(part), part.stop - part.start
    is_first_order = planned.schedule.is_first_order
    adjoints = gradient[None] if is_first_order else memory.adjoints[:tasks]
    if not is_first_order:
        adjoints[:] = 0

    def parameters(slot: int) -> Any:
        if slot == THETA:
            return theta[None]
        return (memory.current if slot == CURRENT else memory.checkpoints[slot - SLOTS])[:tasks]

    for operation, source, target, kept, loss in planned.schedule.instructions:
        records = memory.records if kept < 0 else memory.kept[kept]
        of_sets = memory.losses[:tasks] if loss < 0 else losses[loss, part]
        common = records, kept >= 0 or operation == RECORD, memory.work
        if operation == CURVATURE:
            entry_points.add_curvatures(
                *(planned.layouts[0], parameters(source), adjoints, support.inputs, support.labels),
                *(records, memory.tangents, memory.work, -lr, adjoints),
            )
        elif operation == QUERY:
            entry_points.add_gradients(
                *(planned.layouts[1], parameters(source), *query),
                *(*common, predictions[part], of_sets, 1.0, adjoints),
            )
        else:
            into = parameters(target) if operation == STEP else gradient[None, :0]
            if operation == STEP and source != target:
                into[:] = parameters(source)
            entry_points.add_gradients(
                *(planned.layouts[0], parameters(source), *support),
                *(*common, memory.predictions[:tasks], of_sets, -lr, into),
            )
    if not is_first_order:
        gradient += adjoints.sum(0)


def curves(
    planned: "Plan",
    part: slice,
    theta: Any,
    support: Examples,
    queries: list[Any],
    lr: float,
    memory: Memory,
    adapted: Any,
    predictions: Any,
) -> None:
    """Adapt some of T tasks and predict before each inner step.

    Args:
        planned: Layouts.
        part: The tasks.
        theta: Initial parameters `(P,)`.
        support: Support sets.
        queries: Inputs of the sets that are predicted.
        lr: Inner learning rate alpha.
        memory: Memory of the thread.
        adapted: Receives the parameters after the last step `(T, P)`.
        predictions: Receive the predictions `(k, queries, T, Q, outputs)`.
    """
    layouts, tasks = planned.layouts, part.stop - part.start
    own, support = adapted[part], support.tasks(part)
    own[:] = theta
    for of_step in predictions[:, :, part]:
        for inputs, prediction in zip(queries, of_step, strict=True):
            entry_points.predictions(
                layouts[1], own, inputs[part], memory.records, memory.work, prediction
            )
        entry_points.add_gradients(
            *(layouts[0], own, *support, memory.records, False, memory.work),
            *(memory.predictions[:tasks], memory.losses[:tasks], -lr, own),
        )
