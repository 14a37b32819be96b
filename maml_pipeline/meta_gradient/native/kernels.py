"""Kernels and programs: machine code without the time to compile a large function.

numba optimises a function again in each function that calls it. So no function here calls another
large one: a *kernel* is compiled on its own, and reads what it computes with from its *operands*, which
are matrices in the arrays of a run, integers and numbers. A *program* is a list of calls of kernels with
their operands. Python makes it, once for a layout; `job.py` carries it out.
"""

from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from maml_pipeline.meta_gradient.native.numba_internals import c_function
from maml_pipeline.meta_gradient.native.operands import (
    INTEGERS,
    OPERAND_WORDS,
    arrays_of,
)


class Arrays(NamedTuple):
    """What a program reads and writes, or where that is; `None` for what it does not use.

    Args:
        theta: Parameters `(P,)`.
        vector: What the Hessian is multiplied by `(P,)`.
        target: What a gradient or a product is added to `(P,)`; may be `theta` or `vector`.
        images: `(pixels, channels)`.
        labels: Classes `(S,)`, if the loss is the cross-entropy.
        values: `(S, outputs)`, if the loss is the mean squared error.
        record: Intermediate values.
        tangents: Their tangents.
        work: Working memory.
        prediction: `(S, outputs)`.
        loss: `(1,)`.
    """

    theta: Any = None
    vector: Any = None
    target: Any = None
    images: Any = None
    labels: Any = None
    values: Any = None
    record: Any = None
    tangents: Any = None
    work: Any = None
    prediction: Any = None
    loss: Any = None


(THETA, VECTOR, TARGET, IMAGES, LABELS, VALUES, RECORD, TANGENTS, WORK, PREDICTION, LOSS) = range(
    len(Arrays._fields)
)


class View(NamedTuple):
    """A matrix in one of the arrays, row after row from an offset; a vector is a matrix of one row."""

    array: int
    offset: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def row(self) -> "View":
        """View the elements as one row, where long loops are faster."""
        return self.matrix(1, self.size)

    def part(self, first: int, end: int) -> "View":
        """View some of the rows."""
        return View(self.array, self.offset + first * self.columns, end - first, self.columns)

    def of(self, array: int) -> "View":
        """View the same part of another array."""
        return self._replace(array=array)

    def start_of(self, array: int) -> "View":
        """View a matrix of the same shape at the start of another array."""
        return self._replace(array=array, offset=0)

    def matrix(self, rows: int, columns: int, start: int = 0) -> "View":
        """View the elements from `start` on as a matrix."""
        return View(self.array, self.offset + start, rows, columns)


class Kernel:
    """A function `(arrays, operands, factor)` that is compiled when a program first calls it."""

    def __init__(self, function: Callable[[Any, Any, float], None]) -> None:
        self.function = function
        self.__doc__ = function.__doc__
        self._compiled: dict[str, Any] = {}

    def address(self, dtype: str) -> int:
        """Return where its machine code for a type of numbers is."""
        if dtype not in self._compiled:
            arguments = (arrays_of(getattr(types, dtype)), INTEGERS, types.float64)
            self._compiled[dtype] = c_function(self.function, arguments, dtype)
        return self._compiled[dtype].address  # type: ignore[no-any-return]


class Program:
    """A list of calls of kernels.

    Args:
        dtype: Type of the numbers, such as `"float32"`.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._calls = array("q")

    def call(self, kernel: Kernel, *operands: View | int | float) -> None:
        """Append a call of a kernel with its operands, in the order of its description."""
        self._calls.extend((kernel.address(self.dtype), 2 + OPERAND_WORDS * len(operands)))
        for operand in operands:
            if isinstance(operand, View):
                self._calls.extend(operand)
            else:
                bits = np.float64(operand).view(np.int64) if isinstance(operand, float) else operand
                self._calls.extend((int(bits), 0, 0, 0))

    def extend(self, program: "Program") -> None:
        """Append the calls of another program."""
        self._calls.extend(program._calls)

    def only(self, kernel: Kernel) -> "Program":
        """Return the calls of one kernel alone, to measure their part of the time."""
        program, at = Program(self.dtype), 0
        while at < len(self._calls):
            address, words = self._calls[at : at + 2]
            if address == kernel.address(self.dtype):
                program._calls.extend(self._calls[at : at + words])
            at += words
        return program

    def buffer(self) -> tuple[int, int]:
        """Return the address and the number of the words of the calls."""
        return self._calls.buffer_info()
