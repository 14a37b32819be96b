"""Short tracked trainings, and readers of the W&B logs that they leave."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from maml_pipeline.learner.tracking import read_wandb_log
from tests.helpers import CONFIGS, read_metrics

TOY = ("fit", "--config", CONFIGS / "toy.yaml", "--trainer.enable_progress_bar", "false")
FEW = (*TOY, "--data.val_tasks", 16, "--data.test_tasks", 16)
SHORT = (*FEW, "--trainer.max_steps", 12, "--trainer.val_check_interval", 4, "--probes.every", 11)


def inspected(log: Path, *flags: str) -> str:
    """Read a log with W&B's own reader."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", *flags, "--json", str(log)]
    return subprocess.run(reader, check=True, capture_output=True, text=True).stdout


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, inspected(log).splitlines())
    return [line[kind] for line in lines if line["type"] == kind]


def table_steps(folder: Path) -> list[int]:
    return sorted({int(row["step"]) for row in read_metrics(folder)})


def lowest(folder: Path, metric: str) -> float:
    return min(float(row[metric]) for row in read_metrics(folder) if row[metric])


def logged_steps(*logs: Path) -> list[int]:
    return [int(row["step"]) for log in logs for row in read_wandb_log(log)[1]]


def assert_increasing(steps: list[int]) -> None:
    assert steps and all(earlier < later for earlier, later in pairwise(steps))


def files_with(key: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if key.encode() in path.read_bytes()]


def wandb_id(folder: Path) -> str:
    return (folder / "wandb_id.txt").read_text().strip()
