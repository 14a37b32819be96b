"""The wheel that is built from the source distribution has every file that the package needs."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.helpers import CONFIGS

pytestmark = pytest.mark.integration

CHECKOUT = CONFIGS.parent
FOLDERS = {
    "maml_pipeline": "maml_pipeline",
    "configs": "maml_pipeline/shipped/configs",
    "slurm": "maml_pipeline/shipped/slurm",
}


def test_the_wheel_has_the_package_its_configs_and_job_scripts_and_nothing_else(tmp_path: Path) -> None:
    build = ["bash", str(CHECKOUT / "scripts" / "uv.sh"), "build", "--quiet", "--out-dir", str(tmp_path)]
    subprocess.run([*build, str(CHECKOUT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {
        f"{in_wheel}/{file.relative_to(CHECKOUT / folder).as_posix()}"
        for folder, in_wheel in FOLDERS.items()
        for file in (CHECKOUT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"maml_pipeline/py.typed", "maml_pipeline/shipped/configs/toy.yaml"} <= packed
