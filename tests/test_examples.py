"""The examples run as documented, and show what they claim."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.integration
def test_the_sine_example_meta_trains_both_orders(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "sine.py"), "--max_steps", "60"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    loss = {line[:13].strip(): float(line[13:].split()[3]) for line in lines[2:]}  # after 10 inner steps
    assert loss.keys() == {"untrained", "first order", "second order"}
    assert max(loss["first order"], loss["second order"]) < loss["untrained"]
    assert max(map(len, lines)) <= 80
    assert not finished.stderr
    assert not list(tmp_path.iterdir())
