"""What is the same in every meta-step: the layouts, the instructions, and the memory of a thread."""

from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.native import perceptron
from maml_pipeline.meta_gradient.native.chunk import Memory
from maml_pipeline.meta_gradient.native.convnet.layout import convnet_layout
from maml_pipeline.meta_gradient.native.layout import layout
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.schedule import Schedule, schedule

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
        shapes: Shapes of the arrays of `Memory`, if the network has blocks.
        instructions: Those of the schedule, one in each row, for the compiled functions.
        places: Parts of a thread's memory, if the network has no blocks; see `perceptron.py`.
    """

    layouts: tuple[Any, Any]
    schedule: Schedule
    chunks: tuple[slice, ...]
    shapes: tuple[tuple[int, ...], ...]

    instructions: Any
    places: Any

    def result_sizes(self, parameters: int, outputs: int) -> list[int]:
        """Return the sizes of the sums of the chunks' gradients, of the query predictions and losses."""
        tasks, queries = self.chunks[-1].stop, self.layouts[1].examples
        losses = 1 + max(instruction.loss for instruction in self.schedule.instructions)
        return [len(self.chunks) * parameters, tasks * queries * outputs, tasks * losses]

    def allocate(self, like: Tensor) -> Any:
        """Allocate a thread's memory as one tensor of PyTorch's allocator, which counts it.

        Returns:
            `Memory`; an array if the network has no blocks.
        """
        if not self.shapes:
            return like.new_empty(self.places[-1]).numpy()
        sizes = [prod(shape) for shape in self.shapes]
        memory = like.new_empty(sum(sizes)).numpy()
        ends = accumulate(sizes)
        arrays = [
            memory[end - size : end].reshape(shape)
            for size, end, shape in zip(sizes, ends, self.shapes, strict=True)
        ]
        work, records, kept, tangents, checkpoints, adjoints, predictions, losses = arrays
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
    layouts: Any = (
        lay_out(network, sets.support, sets.bytes_each, sets.classifies),
        lay_out(network, sets.query, sets.bytes_each, sets.classifies),
    )
    size = 1 if network.blocks else TASKS_PER_CHUNK
    instructions = schedule(method, steps, first)
    return Plan(
        layouts=layouts,
        schedule=instructions,
        chunks=tuple(
            slice(start, min(start + size, sets.tasks)) for start in range(0, sets.tasks, size)
        ),
        shapes=_shapes(layouts, instructions, size, network.outputs) if network.blocks else (),
        instructions=np.array(instructions.instructions),
        places=None if network.blocks else perceptron.places(layouts, instructions),
    )


def _shapes(
    layouts: tuple[Any, Any], instructions: Schedule, tasks: int, outputs: int
) -> tuple[tuple[int, ...], ...]:
    support, query = layouts
    is_first_order, parameters = instructions.is_first_order, support.parameters
    work = support.work_size(is_first_order, query)
    tangents = 0 if is_first_order else support.tangents
    return (
        (work,),
        (tasks if instructions.rereads_records else 1, max(support.record, query.record)),
        (instructions.kept, tasks, support.record),
        (max(tangents, tasks * parameters),),
        (instructions.checkpoints, tasks, parameters),
        (0 if is_first_order else tasks, parameters),
        (tasks, support.examples, outputs),
        (tasks,),
    )
