"""Jobs: the programs that each task of a batch runs, one after another, in one call of machine code.

A job is a list of steps. Each step names a program and, for each array that it uses, a *place*: a region
of memory and how far into it, for the first task and the first chunk. So a job is made once, and a call
needs nothing but the addresses of the regions.
"""

import ctypes
from array import array
from functools import cache
from typing import Any, NamedTuple

from numba import types

from maml_pipeline.meta_gradient.native.kernels import Arrays, Program
from maml_pipeline.meta_gradient.native.numba_internals import c_function
from maml_pipeline.meta_gradient.native.operands import INTEGERS, call_kernel, integers_at

ARRAYS = len(Arrays._fields)
PLACES = 3
STEP_WORDS = PLACES + 4 * ARRAYS
"""Words of a step: the address and the length of its program, whether it descends, and its places."""


class Place(NamedTuple):
    """Where an array of a task is.

    Args:
        region: Number of the region.
        start: Bytes before it.
        each_task: Bytes from one task to the next.
        each_chunk: Bytes from one chunk of tasks to the next.
    """

    region: int
    start: int = 0
    each_task: int = 0
    each_chunk: int = 0


NOWHERE = Place(0)


class Job:
    """A list of steps."""

    def __init__(self) -> None:
        self.steps = array("q")
        """`STEP_WORDS` words for each step."""
        self.programs: list[Program] = []
        """The program of each step, whose memory the steps refer to."""

    def step(self, program: Program, places: Arrays, descends: bool = False) -> None:
        """Append a program.

        Args:
            program: The program.
            places: The place of each array that it uses.
            descends: Its factor is minus the inner learning rate, otherwise 1.
        """
        self.programs.append(program)
        self.steps.extend((*program.buffer(), int(descends)))
        for place in places:
            self.steps.extend(NOWHERE if place is None else place)

    def run(self, regions: list[int], lr: float, chunk: int, first: int, end: int) -> None:
        """Carry out all steps for one task after another; other threads run meanwhile.

        Args:
            regions: Addresses of the regions.
            lr: Inner learning rate.
            chunk: Number of the chunk.
            first: The first task.
            end: The task after the last one.
        """
        bases, pointers = array("q", regions), array("q", bytes(8 * ARRAYS))
        addresses = (each.buffer_info()[0] for each in (self.steps, bases, pointers))
        _carry_out()(*addresses, len(self.programs), chunk, first, end, -lr)


def carry_out(
    steps: Any, bases: Any, pointers: Any, number: int, chunk: int, first: int, end: int, descent: float
) -> None:
    """Carry out the steps of a job for one task after another."""
    for task in range(first, end):
        for step in range(number):
            head = step * STEP_WORDS
            for each in range(ARRAYS):
                place = head + PLACES + 4 * each
                tasks, chunks = task * steps[place + 2], chunk * steps[place + 3]
                pointers[each] = bases[steps[place]] + steps[place + 1] + tasks + chunks
            calls, words = integers_at(steps[head]), steps[head + 1]
            factor = descent if steps[head + 2] else 1.0
            at = 0
            while at < words:
                call_kernel(pointers, calls, at, factor)
                at += calls[at + 1]


@cache
def _carry_out() -> Any:
    """Return `carry_out` as a function of C, which runs without Python's global lock."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    arguments = (*[pointer] * 3, *[integer] * 4, ctypes.c_double)
    return ctypes.CFUNCTYPE(None, *arguments)(_compiled().address)


@cache
def _compiled() -> Any:
    arguments = (*[INTEGERS] * 3, *[types.int64] * 4, types.float64)
    return c_function(carry_out, arguments, "job")
