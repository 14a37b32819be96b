"""How the functions of this package are compiled: once, to machine code that runs without Python's lock."""

from collections.abc import Callable
from typing import Any

import numba

# Sums may be reordered and multiplications fused, so that loops use vector instructions. NaN and infinity
# keep their meaning: a loss that is not finite must be seen.
VECTORISED = {"reassoc", "contract", "nsz", "arcp"}

OPTIONS: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": VECTORISED,
    "nogil": True,
}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled functions call, once; the machine code is kept on disk.

    It raises nothing, not even for an index out of range.
    """
    return numba.njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls; other threads run while it does."""
    return numba.njit(**OPTIONS, no_cfunc_wrapper=True)(function)
