"""What kernels are made of that numba has not: reading operands, and calling by address.

The operands of a call are a row of integers, `OPERAND_WORDS` for each. A matrix is the index of an
array, an offset, and the numbers of rows and columns; an integer, or the bits of a number, is the first
of these words.
"""

from collections.abc import Callable
from typing import Any

import numba.core.cgutils
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from maml_pipeline.meta_gradient.native.numba_internals import array_data, array_value

OPERAND_WORDS = 4

cgutils: Any = numba.core.cgutils
c_pointer: Any = types.CPointer
uniform_tuple: Any = types.UniTuple
INTEGERS = c_pointer(types.int64)


def arrays_of(number: Any) -> Any:
    """Return the type of the arrays of a call: C pointers to numbers of a type."""
    return c_pointer(c_pointer(number))


def _generated(define: Callable[..., Any]) -> Any:
    return intrinsic(define)


def _word(builder: Any, operands: Any, index: int, word: int) -> Any:
    at = ir.Constant(ir.IntType(64), OPERAND_WORDS * index + word)
    return builder.load(builder.gep(operands, [at]))


@_generated
def matrices(_context: Any, arrays: Any, operands: Any, count: Any) -> Any:
    """View the first operands as matrices: `(arrays, operands, count)`, with a constant count."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = uniform_tuple(types.Array(arrays.dtype.dtype, 2, "C"), count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, operands, _ = arguments
        views = []
        for index in range(result.count):
            array, offset, rows, columns = (
                _word(builder, operands, index, word) for word in range(OPERAND_WORDS)
            )
            data = builder.gep(builder.load(builder.gep(arrays, [array])), [offset])
            views.append(array_value(context, builder, result.dtype, data, (rows, columns)))
        return context.make_tuple(builder, result, views)

    return result(arrays, operands, count), generate


@_generated
def integers(_context: Any, operands: Any, first: Any, count: Any) -> Any:
    """Read operands that are integers, from `first` on: `(operands, first, count)`, both constant."""
    if not isinstance(first, types.IntegerLiteral) or not isinstance(count, types.IntegerLiteral):
        return None
    result = uniform_tuple(types.int64, count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = first.literal_value
        words = [_word(builder, arguments[0], index, 0) for index in range(start, start + result.count)]
        return context.make_tuple(builder, result, words)

    return result(operands, first, count), generate


@_generated
def number(_context: Any, operands: Any, index: Any) -> Any:
    """Read an operand that is a number: `(operands, index)`, with a constant index."""
    if not isinstance(index, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(_word(builder, arguments[0], index.literal_value, 0), ir.DoubleType())

    return types.float64(operands, index), generate


@_generated
def labels(_context: Any, arrays: Any, operands: Any, index: Any) -> Any:
    """View an operand, a matrix of one column, as classes: `(arrays, operands, index)`.

    The index is constant.
    """
    if not isinstance(index, types.IntegerLiteral):
        return None
    result = types.Array(types.int64, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, operands, _ = arguments
        array, rows = (_word(builder, operands, index.literal_value, word) for word in (0, 2))
        data = builder.bitcast(builder.load(builder.gep(arrays, [array])), operands.type)
        return array_value(context, builder, result, data, (rows,))

    return result(arrays, operands, index), generate


@_generated
def integers_at(_context: Any, address: Any) -> Any:
    """View the integers at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())

    return INTEGERS(address), generate


@_generated
def part(_context: Any, whole: Any, start: Any, length: Any) -> Any:
    """View consecutive numbers of a matrix or vector: `(whole, start, length)`.

    It takes less time to compile than a slice.
    """
    result = types.Array(whole.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, start, length = arguments
        data = builder.gep(array_data(context, builder, whole, array), [start])
        return array_value(context, builder, result, data, (length,))

    return result(whole, types.intp, types.intp), generate


@_generated
def zeros(_context: Any, length: Any, dtype: Any) -> Any:
    """Make a short vector of zeros that lasts until the kernel returns: `(length, dtype)`.

    It is on the stack. `np.zeros` takes more time to compile.
    """
    result = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        length, number = arguments[0], context.get_data_type(dtype.dtype)
        data = builder.alloca(number, length)
        size = builder.mul(length, length.type(context.get_abi_sizeof(number)))
        cgutils.memset(builder, data, size, 0)
        return array_value(context, builder, result, data, (length,))

    return result(types.intp, dtype), generate


@_generated
def call_kernel(_context: Any, arrays: Any, calls: Any, at: Any, factor: Any) -> Any:
    """Call the kernel whose address is word `at` of the calls: `(arrays, calls, at, factor)`.

    Its operands begin two words further.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, calls, at, factor = arguments
        address, operands = builder.gep(calls, [at]), builder.gep(calls, [builder.add(at, at.type(2))])
        _call(builder, builder.load(address), [arrays, operands, factor])
        return context.get_dummy_value()

    return types.void(arrays, calls, at, factor), generate


@_generated
def call_gemm(
    _context: Any, address: Any, flags: Any, sizes: Any, scale: Any, a: Any, b: Any, share: Any, out: Any
) -> Any:
    """Call `gemm` of BLAS, out = scale a b + share out, for matrices column after column.

    The arguments are its address; two characters that tell whether a and b are transposed; m, n, k, and
    the leading dimensions of a, b and out; scale, a, b, share and out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, flags, sizes, scale, a, b, share, out = arguments

        def reference(value: Any) -> Any:
            slot = builder.alloca(value.type)
            builder.store(value, slot)
            return slot

        def references(pack: Any, bits: int) -> list[Any]:
            values = cgutils.unpack_tuple(builder, pack)
            return [reference(builder.trunc(value, ir.IntType(bits))) for value in values]

        m, n, k, rows_of_a, rows_of_b, rows_of_out = references(sizes, 32)
        a, b, out = (
            array_data(context, builder, signature.args[i], array)
            for i, array in ((4, a), (5, b), (7, out))
        )
        matrices = [reference(scale), a, rows_of_a, b, rows_of_b]
        values = [*references(flags, 8), m, n, k, *matrices, reference(share), out, rows_of_out]
        _call(builder, address, values)
        return context.get_dummy_value()

    return types.void(address, flags, sizes, scale, a, b, share, out), generate


def _call(builder: Any, address: Any, arguments: list[Any]) -> None:
    """Call a C function that returns nothing."""
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(builder.inttoptr(address, function.as_pointer()), arguments)
