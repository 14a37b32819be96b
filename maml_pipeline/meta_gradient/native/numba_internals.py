"""How the functions of this package become machine code: once on a machine, kept on disk.

The folder of numba's cache, two of its compiler's options, and how it describes an array are not
documented. `tests/test_internals_numba.py` fails when an upgrade changes them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding
from numba import types
from numba.np import arrayobj
from platformdirs import user_cache_path

# Sums may be reordered and multiplications fused, so that loops use vector instructions. NaN and
# infinity keep their meaning: a loss that is not finite must be seen.
VECTORISED = {"reassoc", "contract", "nsz", "arcp"}

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": VECTORISED}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled functions call.

    It raises nothing, not even for an index out of range.
    """
    return _cached(
        lambda keep: _njit(cache=keep, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function), FOLDER
    )


def c_function(function: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> Any:
    """Compile a function with the calling convention of C, which returns nothing.

    Args:
        function: Compiled for these arguments at once, or read from disk.
        arguments: Types of the arguments.
        folder: Name of its part of the cache. numba may mix up functions that differ in their
            arguments alone when several processes write them at once.

    Returns:
        An object with an `address`, which is valid as long as the object.
    """
    signature = types.void(*arguments)
    return _cached(lambda keep: numba.cfunc(signature, cache=keep, **OPTIONS)(function), FOLDER / folder)


def _njit(**options: bool) -> Any:
    njit: Any = numba.njit
    return njit(nogil=True, **OPTIONS, **options)


def _cached(compile_: Callable[[bool], Any], folder: Path) -> Any:
    # numba reads the folder when a function is decorated. It would otherwise write beside this file, and
    # keep code that calls functions of other files after these have changed.
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return compile_(True)
    except Exception:  # the folder cannot be read or written; errors of the function come again
        return compile_(False)
    finally:
        config.CACHE_DIR = before


def _folder() -> Path:
    """Return where machine code of these sources is kept."""
    sources = hashlib.sha256(f"{numba.__version__} {binding.get_host_cpu_name()}".encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        sources.update(file.read_bytes())
    return user_cache_path("maml_pipeline") / f"compiled-{sources.hexdigest()[:16]}"


FOLDER = _folder()
"""Where numba keeps machine code; another folder after a change of these sources, and for each CPU."""


_arrays: Any = arrayobj


def array_value(context: Any, builder: Any, array_type: Any, data: Any, shape: tuple[Any, ...]) -> Any:
    """Describe numbers in memory as an array, in an intrinsic: row after row, with no owner.

    The array does not keep the memory alive: who calls the compiled code does.
    """
    itemsize = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    strides = [context.get_constant(types.intp, itemsize)]
    for length in shape[:0:-1]:
        strides.insert(0, builder.mul(length, strides[0]))
    array = _arrays.make_array(array_type)(context, builder)
    _arrays.populate_array(
        array, data=data, shape=shape, strides=strides, itemsize=strides[-1], meminfo=None
    )
    return array._getvalue()


def array_data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Return the pointer to an array's numbers, in an intrinsic."""
    return _arrays.make_array(array_type)(context, builder, array).data
