"""The examples run as documented, and show what they claim."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, folder: Path, *arguments: object) -> list[str]:
    """Run an example in an empty folder; return the lines that it prints."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    # No `srun` on the path, which Lightning would advise to use.
    environment = os.environ | {"PATH": str(Path(sys.executable).parent)}
    finished = subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    assert not list(folder.iterdir())
    lines = finished.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


@pytest.mark.integration
def test_the_sine_example_meta_trains_both_orders(tmp_path: Path) -> None:
    lines = run_example("sine.py", tmp_path, "--max_steps", 60)
    loss = {line[:13].strip(): float(line[13:].split()[3]) for line in lines[2:]}  # after 10 inner steps
    assert loss.keys() == {"untrained", "first order", "second order"}
    assert max(loss["first order"], loss["second order"]) < loss["untrained"]


@pytest.mark.integration
def test_the_transformer_example_adapts_each_part(tmp_path: Path) -> None:
    _, _, *rows = run_example("transformer.py", tmp_path, "--max_steps", 40)
    number, loss = {}, {}
    for row in rows:
        number[row[:16].strip()], *loss[row[:16].strip()] = map(float, row[16:].split()[:4])
    assert list(number) == ["head", "adapter and head", "all"]
    assert number["head"] < number["adapter and head"] < number["all"] / 10
    for before, after_one, after_five in loss.values():
        assert after_five < after_one < before


@pytest.mark.integration
def test_the_adapt_example_adapts_a_trained_learner_and_a_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from maml_pipeline.cli import main

    run = tmp_path_factory.mktemp("runs") / "sine"
    short = ("--trainer.max_steps", "1000", "--data.test_tasks", "2", "--data.val_tasks", "2")
    main(["fit", "--config", "sine", *short, "--run.dir", str(run)])
    for arguments in (("--max_steps", 1000), ("--run", run)):
        _, *lines = run_example("adapt.py", tmp_path, *arguments)
        errors = {int(line.split()[2]): float(line.split()[3]) for line in lines}
        assert list(errors) == [0, 1, 5, 10]
        assert errors[5] < errors[1] < errors[0]
