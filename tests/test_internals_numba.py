"""Canaries: what `meta_gradient/native/numba_internals.py` relies on still holds in this numba."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from maml_pipeline.meta_gradient.native import numba_internals
from maml_pipeline.meta_gradient.native.columns import window

DOUBLES: Any = types.CPointer(types.float64)  # type: ignore[no-untyped-call]


def changed(what: str) -> str:
    file = "maml_pipeline/meta_gradient/native/numba_internals.py"
    return f"numba {numba.__version__} changed {what}: see {file}"


def test_functions_of_functions_have_no_wrapper_for_python() -> None:
    assert window.targetoptions["no_cpython_wrapper"], changed("the options of its compiler")


@pytest.mark.integration
def test_machine_code_is_kept_in_the_folder_of_these_sources(tmp_path: Path) -> None:
    program = """
from numba import types
from maml_pipeline.meta_gradient.native.numba_internals import FOLDER
from maml_pipeline.meta_gradient.native.products import clear
clear.address("float64")
print(FOLDER, *FOLDER.rglob("*.nbc"))
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    folder, *files = result.stdout.split()
    assert Path(folder).is_relative_to(tmp_path)
    assert files, changed("where it keeps machine code")


def pair_of_rows(_context: Any, numbers: Any) -> Any:
    result = types.Array(types.float64, 2, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shape = tuple(context.get_constant(types.intp, length) for length in (2, 3))
        matrix = numba_internals.array_value(context, builder, result, arguments[0], shape)
        data = numba_internals.array_data(context, builder, result, matrix)
        return numba_internals.array_value(context, builder, result, data, shape)

    return result(numbers), generate


def test_numbers_in_memory_are_an_array() -> None:
    view: Any = intrinsic(pair_of_rows)

    def negate_the_second_row(numbers: Any) -> None:
        matrix = view(numbers)
        for column in range(matrix.shape[1]):
            matrix[1, column] *= -1

    function = numba_internals.c_function(negate_the_second_row, (DOUBLES,), "tests")
    numbers = np.arange(1.0, 8.0)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)(numbers.ctypes.data)
    assert numbers.tolist() == [1, 2, 3, -4, -5, -6, 7], changed("how it describes an array")
