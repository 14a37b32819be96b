"""A meta-gradient as a list of instructions: which gradients are taken, where, and what is kept.

Instructions name parameters by slot: slot 0 holds theta_0, slot 1 those of the current step, and the
others those that the backward sweep needs again. The methods differ in nothing but their instructions.
"""

from typing import NamedTuple

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.checkpointed import segment_starts

STEP, QUERY, RECORD, CURVATURE = range(4)
"""Operations: take an inner step; add the query gradient to the adjoint; compute the record of a step
that was not kept; multiply the adjoint by I - alpha H."""

INITIAL, CURRENT = 0, 1
SLOTS = 2
"""Number of slots besides the checkpoints."""


class Instruction(NamedTuple):
    """One operation on a task.

    Args:
        operation: One of the above.
        source: Slot of the parameters at which the gradient or the Hessian is taken.
        target: Slot of the parameters after an inner step.
        kept: Which of the kept records it writes or reads; -1 for none of them.
        loss: Where the loss is stored; -1 for nowhere.
    """

    operation: int
    source: int
    target: int = -1
    kept: int = -1
    loss: int = -1


class Schedule(NamedTuple):
    """The instructions of a method.

    Args:
        instructions: In order.
        is_first_order: The query gradient is the result.
        checkpoints: Number of slots besides theta_0 and the current step.
        kept: Number of records that are kept.
    """

    instructions: tuple[Instruction, ...]
    is_first_order: bool
    checkpoints: int
    kept: int


def schedule(method: Method, steps: int, first: int) -> Schedule:
    """Return the instructions of a method for a number of inner steps k.

    Unrolled, the parameters and the record of each differentiated step are kept. Checkpointed, only the
    parameters that start a segment, and those of the last segment, which is swept first; see
    `checkpointed.py`.

    Args:
        method: Unrolled or checkpointed.
        steps: Number of inner steps k.
        first: The first differentiated step; k for first order.
    """
    differentiated = list(range(first, steps))
    keeps_records = method is not Method.CHECKPOINTED
    if keeps_records:
        saved = set(differentiated)
    else:
        starts = [first + start for start in segment_starts(len(differentiated))]
        saved = {t for t in differentiated if t in starts or t > starts[-1]}

    instructions: list[Instruction] = []
    slots, used = {0: INITIAL}, {INITIAL, CURRENT}

    def take_slot() -> int:
        slot = next(slot for slot in range(len(used) + 1) if slot not in used)
        used.add(slot)
        return slot

    for t in range(steps):
        slots[t + 1] = take_slot() if t + 1 in saved else CURRENT
        kept = t - first if keeps_records and t in saved else -1
        instructions.append(Instruction(STEP, slots[t], slots[t + 1], kept, loss=t))
    most = len(used)
    instructions.append(Instruction(QUERY, slots[steps], loss=steps))
    held = {t: slots[t] for t in saved}
    for t in reversed(differentiated):
        for s in range(max(s for s in held if s <= t), t):
            held[s + 1] = take_slot()
            instructions.append(Instruction(STEP, held[s], held[s + 1]))
        most = max(most, len(used))
        if not keeps_records:
            instructions.append(Instruction(RECORD, held[t]))
        instructions.append(Instruction(CURVATURE, held[t], kept=t - first if keeps_records else -1))
        used -= {held.pop(t)} - {INITIAL}
    return Schedule(
        instructions=tuple(instructions),
        is_first_order=not differentiated,
        checkpoints=most - SLOTS,
        kept=len(saved) if keeps_records else 0,
    )
