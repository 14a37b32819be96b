"""How the functions of this package become machine code: once on a machine, kept on disk.

The folder of numba's cache, two of its compiler's options, and how it describes an array are not
documented. `tests/test_internals_numba.py` fails when an upgrade changes them.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from platformdirs import user_cache_path

# Sums may be reordered and multiplications fused, so that loops use vector instructions. NaN and
# infinity keep their meaning: a loss that is not finite must be seen.
VECTORISED = {"reassoc", "contract", "nsz", "arcp"}

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": VECTORISED, "nogil": True}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled functions call.

    It raises nothing, not even for an index out of range.
    """
    return _jit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls; other threads run while it does."""
    return _jit(function, no_cfunc_wrapper=True)


def _jit(function: Callable[..., Any], **options: bool) -> Any:
    # numba reads the folder when a function is decorated. It would otherwise write beside this file, and
    # keep code that calls functions of other files after these have changed.
    njit: Any = numba.njit
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(FOLDER)
    try:
        return njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:  # the folder cannot be written to
        return njit(**OPTIONS, **options)(function)
    finally:
        config.CACHE_DIR = before


def _folder() -> Path:
    """Return where machine code of these sources is kept."""
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    return user_cache_path("maml_pipeline") / f"compiled-{sources.hexdigest()[:16]}"


FOLDER = _folder()
"""Where numba keeps machine code; another folder after a change of these sources."""


def _matrix(_context: Any, array: Any, offset: Any, rows: Any, columns: Any) -> Any:
    signature = types.Array(array.dtype, 2, "C")(array, types.intp, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, first, rows, columns = arguments
        source = make_array(signature.args[0])(context, builder, values)
        view = make_array(signature.return_type)(context, builder)
        size = context.get_abi_sizeof(context.get_data_type(array.dtype))
        each = context.get_constant(types.intp, size)
        populate_array(
            view,
            data=builder.gep(source.data, [first]),
            shape=(rows, columns),
            strides=(builder.mul(columns, each), each),
            itemsize=each,
            meminfo=None,
        )
        return view._getvalue()

    return signature, generate


matrix: Any = intrinsic(_matrix)
"""View a part of a flat array as a matrix: `matrix(array, offset, rows, columns)`.

It costs nothing, where a slice and `reshape` cost as much as the product of two small matrices. It does
not keep the array alive: the caller of the entry point does.
"""
