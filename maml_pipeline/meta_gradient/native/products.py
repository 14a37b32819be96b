"""Matrix products, which the BLAS of SciPy computes, and sums of matrices and vectors."""

from functools import cache
from typing import Any

from numba.extending import get_cython_function_address

from maml_pipeline.meta_gradient.native.kernels import Kernel, Program, View
from maml_pipeline.meta_gradient.native.operands import call_gemm, integers, matrices, number


@Kernel
def gemm(arrays: Any, operands: Any, factor: float) -> None:
    """Compute out = scale a b + share out, with a or b transposed.

    Operands: a, b, out, T or N for a and for b, their common dimension, whether the scale is `factor`
    instead of 1, the address of BLAS, share.
    """
    a, b, out = matrices(arrays, operands, 3)
    transposes_a, transposes_b, inner, scales, blas = integers(operands, 3, 5)
    scale = out.dtype.type(factor if scales else 1.0)
    share = out.dtype.type(number(operands, 8))
    # Row after row is column after column of the transposed: out^T = b^T a^T.
    sizes = (out.shape[1], out.shape[0], inner, b.shape[1], a.shape[1], out.shape[1])
    call_gemm(blas, (transposes_b, transposes_a), sizes, scale, b, a, share, out)


def multiply(
    program: Program,
    a: View,
    b: View,
    out: View,
    transpose_a: bool = False,
    transpose_b: bool = False,
    add: bool = False,
    scale: bool = False,
) -> None:
    """Append out = a b, or out += a b, with a or b transposed, and a b scaled by `factor`."""
    flags = (ord("T" if transposed else "N") for transposed in (transpose_a, transpose_b))
    inner = a.rows if transpose_a else a.columns
    program.call(gemm, a, b, out, *flags, inner, int(scale), _blas_gemm(program.dtype), float(add))


@cache
def _blas_gemm(dtype: str) -> int:
    name = "sgemm" if dtype == "float32" else "dgemm"
    return int(get_cython_function_address("scipy.linalg.cython_blas", name))


@Kernel
def clear(arrays: Any, operands: Any, factor: float) -> None:
    """Set a matrix to 0. Operands: the matrix."""
    (target,) = matrices(arrays, operands, 1)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] = 0


@Kernel
def add_to_rows(arrays: Any, operands: Any, factor: float) -> None:
    """Add a vector to each row of a matrix. Operands: the vector, the matrix."""
    vector, target = matrices(arrays, operands, 2)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] += vector[0, j]


@Kernel
def add_to_rows_and_rectify(arrays: Any, operands: Any, factor: float) -> None:
    """Add a vector to each row of a matrix, and take the ReLU. Operands: the vector, the matrix."""
    vector, target = matrices(arrays, operands, 2)
    zero = target.dtype.type(0)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            value = target[i, j] + vector[0, j]
            target[i, j] = zero if value < zero else value  # NaN stays


@Kernel
def mask(arrays: Any, operands: Any, factor: float) -> None:
    """Set a matrix to 0 where another one is not positive. Operands: the other one, the matrix."""
    values, target = matrices(arrays, operands, 2)
    zero = target.dtype.type(0)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] = zero if values[i, j] <= zero else target[i, j]  # where NaN is, too


@Kernel
def copy(arrays: Any, operands: Any, factor: float) -> None:
    """Copy a matrix to another one. Operands: the matrix, the other one."""
    values, target = matrices(arrays, operands, 2)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] = values[i, j]


@Kernel
def add_rows(arrays: Any, operands: Any, factor: float) -> None:
    """Add `factor` times the sum of a matrix's rows to a vector. Operands: the matrix, the vector."""
    values, target = matrices(arrays, operands, 2)
    scale = values.dtype.type(factor)
    for i in range(len(values)):
        for j in range(values.shape[1]):
            target[0, j] += scale * values[i, j]


@Kernel
def add_scaled(arrays: Any, operands: Any, factor: float) -> None:
    """Add `factor` times a matrix to another one. Operands: the matrix, the other one."""
    values, target = matrices(arrays, operands, 2)
    scale = values.dtype.type(factor)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] += scale * values[i, j]
