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
from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.products import clear

DOUBLES: Any = types.CPointer(types.float64)  # type: ignore[no-untyped-call]


def changed(what: str) -> str:
    file = "maml_pipeline/meta_gradient/native/numba_internals.py"
    return f"numba {numba.__version__} changed {what}: see {file}"


def test_functions_of_functions_have_no_wrapper_for_python() -> None:
    assert window.targetoptions["no_cpython_wrapper"], changed("the options of its compiler")


COMPILE = """
from maml_pipeline.meta_gradient.native.numba_internals import FOLDER
from maml_pipeline.meta_gradient.native.products import add_to_rows, clear, gemm
for kernel in (add_to_rows, clear, gemm):
    for dtype in ("float32", "float64"):
        assert kernel.address(dtype)
print(FOLDER, *FOLDER.rglob("*.nbc"))
"""


def start_compiling(cache: Path) -> subprocess.Popen[str]:
    environment = {"XDG_CACHE_HOME": str(cache), "PATH": "", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", COMPILE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.integration
def test_processes_keep_machine_code_together_and_do_without_a_part_of_it(tmp_path: Path) -> None:
    processes = [start_compiling(tmp_path) for _ in range(2)]
    for process in processes:
        folder, *files = process.communicate()[0].split()
        assert process.returncode == 0
        assert Path(folder).is_relative_to(tmp_path)
    assert len(files) == 3 * 2, changed("where it keeps machine code")
    Path(files[0]).unlink()
    Path(files[1]).write_bytes(b"")
    process = start_compiling(tmp_path)
    assert len(process.communicate()[0].split()) == 1 + len(files)
    assert process.returncode == 0


def test_without_a_folder_machine_code_is_compiled_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a file"
    file.touch()
    monkeypatch.setattr(numba_internals, "FOLDER", file)
    assert Kernel(clear.function).address("float32")


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
