"""Canaries: what `meta_gradient/native/numba_internals.py` relies on still holds in this numba."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from maml_pipeline.meta_gradient.native import numba_internals
from maml_pipeline.meta_gradient.native.products import fill


def changed(what: str) -> str:
    file = "maml_pipeline/meta_gradient/native/numba_internals.py"
    return f"numba {numba.__version__} changed {what}: see {file}"


def test_functions_of_functions_have_no_wrapper_for_python() -> None:
    wrapped = numba_internals.entry_point(fill.py_func)
    x = np.ones(3)
    wrapped(x, 0)
    assert not x.any()
    assert fill.targetoptions["no_cpython_wrapper"], changed("the options of its compiler")


@pytest.mark.integration
def test_machine_code_is_kept_in_the_folder_of_these_sources(tmp_path: Path) -> None:
    program = """
import numpy as np
from maml_pipeline.meta_gradient.native.numba_internals import FOLDER, entry_point
from maml_pipeline.meta_gradient.native.products import fill
entry_point(fill.py_func)(np.ones(3), 0)
print(FOLDER, *FOLDER.rglob("*.nbc"))
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    folder, *files = result.stdout.split()
    assert Path(folder).is_relative_to(tmp_path)
    assert files, changed("where it keeps machine code")


def test_a_view_as_a_matrix_shares_the_numbers_of_the_array() -> None:
    @numba_internals.entry_point
    def double(array: Any) -> Any:
        view = numba_internals.matrix(array, 1, 2, 3)
        for row in range(view.shape[0]):
            for column in range(view.shape[1]):
                view[row, column] *= 2
        return view.T.copy()

    array = np.arange(8.0)
    expected = 2 * array[1:7].reshape(2, 3)
    assert (double(array) == expected.T).all(), changed("how it describes an array")
    assert (array == [0, *expected.ravel(), 7]).all(), changed("how it describes an array")
