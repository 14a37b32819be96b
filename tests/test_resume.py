"""A run that is killed and resumed ends as one that never was."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import CONFIGS

RUN = (
    "fit",
    "--config",
    CONFIGS / "toy.yaml",
    "--trainer.max_steps",
    300,
    "--trainer.val_check_interval",
    50,
    "--trainer.log_every_n_steps",
    7,
    "--run.checkpoint_every",
    20,
    "--data.val_tasks",
    10,
    "--data.test_tasks",
    10,
)


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    moments = loaded["optimizer_states"][0]["state"]
    adam = {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}
    weights: dict[str, torch.Tensor] = loaded["state_dict"]
    return weights | adam | {"meta_step": torch.tensor(loaded["global_step"])}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def kill_once_at(folder: Path, steps: int, accumulate: int) -> None:
    """Run the command in a process of its own and kill it once it has logged so many meta-steps."""
    command = [sys.executable, "-m", "maml_pipeline", *map(str, RUN), "--run.dir", str(folder)]
    command += ["--trainer.accumulate_grad_batches", str(accumulate)]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.csv").exists() and int(
                (rows(folder) or [{"step": "0"}])[-1]["step"]
            ) > steps:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_fit_resumes_bit_for_bit(
    maml: Callable[..., str], tmp_path: Path, accumulate: int
) -> None:
    settings = ("--trainer.accumulate_grad_batches", accumulate)
    maml(*RUN, *settings, "--run.dir", tmp_path / "whole")
    kill_once_at(tmp_path / "killed", 110, accumulate)
    killed_at = int(checkpoint(tmp_path / "killed")["meta_step"])
    assert 0 < killed_at < 300
    maml(*RUN, *settings, "--run.dir", tmp_path / "killed", "--ckpt_path", "last")

    whole, killed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    # The metrics are those of the run that never stopped: no gap, no row twice.
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    for name in ("test.json", "wandb_id.txt"):
        assert (tmp_path / "killed" / name).exists()
    assert (tmp_path / "whole" / "test.json").read_text() == (
        tmp_path / "killed" / "test.json"
    ).read_text()
