"""One chunk of tasks: the instructions of a meta-gradient, carried out by the compiled functions.

Nothing is allocated here: other threads carry out other chunks, each with memory of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from maml_pipeline.meta_gradient.native import gradients
from maml_pipeline.meta_gradient.native.convnet import entry_points
from maml_pipeline.meta_gradient.native.convnet.layout import ConvNetLayout
from maml_pipeline.meta_gradient.native.layout import Layout
from maml_pipeline.meta_gradient.native.schedule import (
    CURRENT,
    CURVATURE,
    QUERY,
    RECORD,
    SLOTS,
    STEP,
    THETA,
    Schedule,
)

AnyLayout: TypeAlias = Layout | ConvNetLayout
"""Of a network without or with blocks."""


class Examples(NamedTuple):
    """Support or query sets of T tasks, as arrays.

    Args:
        inputs: `(T, S, features)`, or images as `(T, S * height * width, channels)`.
        labels: `(T, S)` if the loss is the cross-entropy, otherwise `(T, 0)`.
        values: `(T, S, outputs)` if the loss is the mean squared error, otherwise `(T, 0, 0)`.
    """

    inputs: Any
    labels: Any
    values: Any

    def tasks(self, chunk: slice) -> "Examples":
        """Select tasks."""
        return Examples(self.inputs[chunk], self.labels[chunk], self.values[chunk])


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


class Functions(NamedTuple):
    """The entry points for a network; `convnet/entry_points.py` describes them."""

    predictions: Callable[..., None]
    add_gradients: Callable[..., None]
    add_curvatures: Callable[..., None]


WITH_BLOCKS = Functions(
    entry_points.predictions, entry_points.add_gradients, entry_points.add_curvatures
)
WITHOUT_BLOCKS = Functions(
    gradients.dense_predictions, gradients.add_dense_gradients, gradients.add_dense_curvatures
)


def functions(layout: AnyLayout) -> Functions:
    """Return the entry points for a network."""
    return WITH_BLOCKS if isinstance(layout, ConvNetLayout) else WITHOUT_BLOCKS


class ChunkResult(NamedTuple):
    """Where a chunk of C tasks puts its results.

    Args:
        gradient: `(1, P)`: the sum of the tasks' meta-gradients. Zero before.
        predictions: Predictions of the query sets `(C, Q, outputs)`.
        losses: `(k + 1, C)`: the support losses before each inner step and, last, the query losses.
    """

    gradient: Any
    predictions: Any
    losses: Any


def meta_gradient(
    layouts: tuple[AnyLayout, AnyLayout],
    theta: Any,
    support: Examples,
    query: Examples,
    lr: float,
    schedule: Schedule,
    memory: Memory,
    result: ChunkResult,
) -> None:
    """Add up the meta-gradients of a chunk of C tasks.

    Args:
        layouts: Layouts of the support and the query sets.
        theta: Initial parameters `(1, P)`.
        support: Support sets.
        query: Query sets.
        lr: Inner learning rate alpha.
        schedule: What to do.
        memory: Memory of the thread.
        result: Receives the result.
    """
    call, tasks = functions(layouts[0]), len(result.predictions)
    adjoints = result.gradient if schedule.is_first_order else memory.adjoints[:tasks]
    if not schedule.is_first_order:
        adjoints[:] = 0

    def parameters(slot: int) -> Any:
        if slot == THETA:
            return theta
        return (memory.current if slot == CURRENT else memory.checkpoints[slot - SLOTS])[:tasks]

    for operation, source, target, kept, loss in schedule.instructions:
        records = memory.records if kept < 0 else memory.kept[kept]
        losses = memory.losses[:tasks] if loss < 0 else result.losses[loss]
        common = records, kept >= 0 or operation == RECORD, memory.work
        if operation == CURVATURE:
            call.add_curvatures(
                *(layouts[0], parameters(source), adjoints, support.inputs, support.labels),
                *(records, memory.tangents, memory.work, -lr, adjoints),
            )
        elif operation == QUERY:
            call.add_gradients(
                *(layouts[1], parameters(source), *query),
                *(*common, result.predictions, losses, 1.0, adjoints),
            )
        else:
            into = parameters(target) if operation == STEP else result.gradient[:, :0]
            if operation == STEP and source != target:
                into[:] = parameters(source)
            call.add_gradients(
                *(layouts[0], parameters(source), *support),
                *(*common, memory.predictions[:tasks], losses, -lr, into),
            )
    if not schedule.is_first_order:
        result.gradient[0] += adjoints.sum(0)


def curves(
    layouts: tuple[AnyLayout, AnyLayout],
    theta: Any,
    support: Examples,
    queries: list[Any],
    lr: float,
    steps: int,
    memory: Memory,
    adapted: Any,
    predictions: Any,
) -> None:
    """Adapt a chunk of C tasks and predict before each step.

    Args:
        layouts: Layouts of the support sets and of the sets that are predicted.
        theta: Initial parameters `(1, P)`.
        support: Support sets.
        queries: Inputs of the sets that are predicted.
        lr: Inner learning rate alpha.
        steps: Number of inner steps k.
        memory: Memory of the thread.
        adapted: Receives the parameters after the last step `(C, P)`.
        predictions: Receive the predictions `(k, queries, C, Q, outputs)`.
    """
    call, tasks = functions(layouts[0]), len(adapted)
    adapted[:] = theta
    for step in range(steps):
        for inputs, prediction in zip(queries, predictions[step], strict=True):
            call.predictions(layouts[1], adapted, inputs, memory.records, memory.work, prediction)
        call.add_gradients(
            *(layouts[0], adapted, *support, memory.records, False, memory.work),
            *(memory.predictions[:tasks], memory.losses[:tasks], -lr, adapted),
        )
