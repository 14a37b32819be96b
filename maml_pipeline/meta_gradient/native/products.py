"""Matrix products of the compiled functions; numba calls the BLAS of SciPy, on one thread."""

from typing import Any

import numpy as np

from maml_pipeline.meta_gradient.native.numba_internals import compiled, flat


@compiled
def fill(target: Any, value: float) -> None:
    """Set the numbers of a vector to one value."""
    for i in range(len(target)):
        target[i] = value


@compiled
def copy(values: Any, target: Any) -> None:
    """Copy a vector to another one."""
    for i in range(len(target)):
        target[i] = values[i]


@compiled
def add(values: Any, target: Any) -> None:
    """Add an array to another one in place."""
    numbers, sums = flat(values), flat(target)
    for i in range(len(sums)):
        sums[i] += numbers[i]


@compiled
def add_to_rows(vector: Any, target: Any) -> None:
    """Add a vector to each row of a matrix in place."""
    for i in range(len(target)):
        for j in range(target.shape[1]):
            target[i, j] += vector[j]


@compiled
def add_rows(factor: float, values: Any, target: Any) -> None:
    """Add `factor` times the sum of the rows of a matrix to a vector in place."""
    scale = values.dtype.type(factor)
    for i in range(len(values)):
        for j in range(values.shape[1]):
            target[j] += scale * values[i, j]


@compiled
def add_to_rows_and_rectify(vector: Any, target: Any) -> None:
    """Add a vector to each row of a matrix in place, and set negative results to 0."""
    zero = target.dtype.type(0)
    for i in range(len(target)):
        for j in range(target.shape[1]):
            value = target[i, j] + vector[j]
            target[i, j] = value if value > zero else zero


@compiled
def mask(values: Any, target: Any) -> None:
    """Set the numbers of an array to 0 in place where those of another one are not positive."""
    zero = target.dtype.type(0)
    numbers, masked = flat(values), flat(target)
    for i in range(len(masked)):
        masked[i] = masked[i] if numbers[i] > zero else zero


@compiled
def product(x: Any, w: Any, out: Any) -> None:
    """Compute out = x w^T: the values of a layer with inputs x and weights w."""
    np.dot(x, w.T, out)


@compiled
def product_by_input(delta: Any, w: Any, out: Any) -> None:
    """Compute out = delta w: the gradient by the inputs of a layer."""
    np.dot(delta, w, out)


@compiled
def product_by_weights(delta: Any, x: Any, out: Any) -> None:
    """Compute out = delta^T x: the gradient by the weights of a layer."""
    np.dot(delta.T, x, out)


@compiled
def add_scaled(factor: float, values: Any, target: Any) -> None:
    """Add `factor` times an array to another one in place."""
    scale = values.dtype.type(factor)
    numbers, sums = flat(values), flat(target)
    for i in range(len(sums)):
        sums[i] += scale * numbers[i]
