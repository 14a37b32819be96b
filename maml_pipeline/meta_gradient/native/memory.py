"""The memory of a thread, as parts of one tensor of PyTorch's allocator, which counts it."""

from math import prod
from typing import Any

from torch import Tensor

from maml_pipeline.meta_gradient.native.chunk import Memory
from maml_pipeline.meta_gradient.native.layout import OUTPUTS, Layout
from maml_pipeline.meta_gradient.native.schedule import Schedule
from maml_pipeline.meta_gradient.native.work import Work, work_sizes


def allocate(like: Tensor, layouts: tuple[Layout, Layout], tasks: int, schedule: Schedule) -> Memory:
    """Allocate memory for a chunk.

    Args:
        like: A tensor of the same type.
        layouts: Layouts of the support and the query sets.
        tasks: Number of tasks C.
        schedule: What is to be done.
    """
    support = layouts[0]
    work = work_sizes(layouts, schedule.is_first_order)
    parameters, outputs = support.parameters, int(support.dense[-1, OUTPUTS])
    tangents = 0 if schedule.is_first_order else support.tangents
    shapes: list[tuple[int, ...]] = [
        *((size,) for size in work),
        (tasks if schedule.rereads_records else 1, max(layout.record for layout in layouts)),
        (schedule.kept, tasks, support.record),
        (max(tangents, tasks * parameters),),
        (schedule.checkpoints, tasks, parameters),
        (0 if schedule.is_first_order else tasks, parameters),
        (tasks, support.examples, outputs),
        (tasks,),
    ]
    memory, start = like.new_empty(sum(map(prod, shapes))).numpy(), 0
    arrays: list[Any] = []
    for shape in shapes:
        arrays.append(memory[start : start + prod(shape)].reshape(shape))
        start += prod(shape)
    records, kept, tangents_, checkpoints, adjoints, predictions, losses = arrays[len(work) :]
    parts = Work(*arrays[: len(work)])
    if not work.delta:
        parts = parts._replace(delta=parts.u_dot)
    return Memory(
        work=parts,
        records=records,
        kept=kept,
        tangents=tangents_,
        current=tangents_[: tasks * parameters].reshape(tasks, parameters),
        checkpoints=checkpoints,
        adjoints=adjoints,
        predictions=predictions,
        losses=losses,
    )
