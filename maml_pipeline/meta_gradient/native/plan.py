"""What is the same in every meta-step: the layouts, the instructions, and the memory of a thread."""

from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.native.chunk import AnyLayout, Memory
from maml_pipeline.meta_gradient.native.convnet.layout import ConvNetLayout, convnet_layout
from maml_pipeline.meta_gradient.native.layout import Layout, layout
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.schedule import Schedule, schedule
from maml_pipeline.meta_gradient.native.work import Work, work_sizes

TASKS_PER_CHUNK = 32
"""For networks without blocks, where a call from Python takes as long as several tasks."""


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
    """How a batch of tasks is computed.

    Args:
        layouts: Layouts of the support and the query sets.
        schedule: Instructions for each chunk.
        chunks: The tasks of each chunk: one if the network has blocks, so that a thread holds one task's
            intermediate values at a time.
        shapes: Shapes of the arrays of `Memory`; its working memory may be several arrays, `Work`.
    """

    layouts: tuple[AnyLayout, AnyLayout]
    schedule: Schedule
    chunks: tuple[slice, ...]
    shapes: tuple[tuple[int, ...], ...]

    def allocate(self, like: Tensor) -> Memory:
        """Allocate a thread's memory as one tensor of PyTorch's allocator, which counts it."""
        sizes = [prod(shape) for shape in self.shapes]
        memory = like.new_empty(sum(sizes)).numpy()
        ends = accumulate(sizes)
        arrays = [
            memory[end - size : end].reshape(shape)
            for size, end, shape in zip(sizes, ends, self.shapes, strict=True)
        ]
        parts = len(arrays) - 7
        work = Work(*arrays[:parts]) if parts > 1 else arrays[0]
        records, kept, tangents, checkpoints, adjoints, predictions, losses = arrays[parts:]
        current = tangents[: len(losses) * adjoints.shape[1]].reshape(len(losses), -1)
        return Memory(work, records, kept, tangents, current, checkpoints, adjoints, predictions, losses)


@lru_cache(maxsize=64)
def plan(network: FeedForward, sets: Sets, method: Method, steps: int, first: int) -> Plan:
    """Plan the meta-gradients of a network; with no steps, its evaluations.

    Args:
        network: The network.
        sets: The kind of tasks.
        method: Unrolled or checkpointed.
        steps: Number of inner steps k.
        first: The first differentiated step; k for first order.
    """
    lay_out = convnet_layout if network.blocks else layout
    layouts = (
        lay_out(network, sets.support, sets.bytes_each, sets.classifies),
        lay_out(network, sets.query, sets.bytes_each, sets.classifies),
    )
    size = 1 if network.blocks else min(TASKS_PER_CHUNK, sets.tasks)
    instructions = schedule(method, steps, first)
    return Plan(
        layouts=layouts,
        schedule=instructions,
        chunks=tuple(
            slice(start, min(start + size, sets.tasks)) for start in range(0, sets.tasks, size)
        ),
        shapes=_shapes(layouts, instructions, size, network.dense[-1][1]),
    )


def _shapes(
    layouts: tuple[AnyLayout, AnyLayout], instructions: Schedule, tasks: int, outputs: int
) -> tuple[tuple[int, ...], ...]:
    support, query = layouts
    is_first_order, parameters = instructions.is_first_order, support.parameters
    if isinstance(support, ConvNetLayout) and isinstance(query, ConvNetLayout):
        work: tuple[int, ...] = (support.work_size(is_first_order, query),)
    elif isinstance(support, Layout) and isinstance(query, Layout):
        work = work_sizes((support, query), is_first_order)
    tangents = 0 if is_first_order else support.tangents
    return (
        *((size,) for size in work),
        (tasks if instructions.rereads_records else 1, max(support.record, query.record)),
        (instructions.kept, tasks, support.record),
        (max(tangents, tasks * parameters),),
        (instructions.checkpoints, tasks, parameters),
        (0 if is_first_order else tasks, parameters),
        (tasks, support.examples, outputs),
        (tasks,),
    )
