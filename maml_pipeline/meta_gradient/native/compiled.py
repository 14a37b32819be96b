"""How the functions of this package are compiled: once, to machine code that runs without Python's lock."""

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered and multiplications fused, so that loops use vector instructions. NaN and infinity
# keep their meaning: a loss that is not finite must be seen.
VECTORISED = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[..., Any], entry=False) -> Any:
    """Compile a function of arrays and numbers at its first call, and keep the result on disk.

    Other threads run while it does. It raises nothing, not even for an index out of range.
    """
    return numba.njit(
        nogil=True, cache=True, fastmath=VECTORISED, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=not entry
    )(function)


def entry(function):
    return compiled(function, entry=True)
