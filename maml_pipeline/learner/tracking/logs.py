"""W&B's logs as they lie in a run's folder."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maml_pipeline.errors import UserError

STEP_METRIC = "meta_step"
"""Every metric's axis: the number of the meta-step, from 0."""


def find_wandb_logs(folder: Path) -> dict[str, list[Path]]:
    """Return W&B's logs in or below a folder by run, those of a resumed run in order."""
    return group_wandb_logs(folder.rglob("run-*.wandb"))


def group_wandb_logs(logs: Iterable[Path]) -> dict[str, list[Path]]:
    """Return W&B's logs by run, those of a resumed run in order."""
    runs: dict[str, list[Path]] = {}
    # .../wandb/offline-run-20261124_030330-f76e1feb/run-f76e1feb.wandb: by the time in the name.
    found = {path.resolve() for path in logs}
    for log in sorted(found, key=lambda log: (log.parent.name.removeprefix("offline-"), log)):
        runs.setdefault(str(log.parent.parent / log.stem), []).append(log)
    return runs


def is_offline(log: Path) -> bool:
    """Tell whether a log was written without a connection."""
    return log.parent.name.startswith("offline-")


def is_synced(log: Path) -> bool:
    """Tell whether W&B has marked a log as uploaded."""
    return log.with_suffix(".wandb.synced").exists()


def is_empty(log: Path) -> bool:
    """Tell whether a log has no record: it was killed before W&B had written its first block."""
    return log.stat().st_size < 64


def read_wandb_log(log: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Read a W&B run that was never uploaded, also one that still goes on.

    Args:
        log: Its `run-<id>.wandb`.

    Returns:
        The config, and what was logged with the meta-step under `step`, in order.

    Raises:
        UserError: W&B's own reader cannot read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or "no reason"
        raise UserError(f"{log.name} cannot be read: {words.splitlines()[-1]}")
    config: dict[str, Any] = {}
    history = []
    try:
        for record in map(json.loads, done.stdout.splitlines()):
            if record["type"] == "run":
                config = record["run"]["config"]["update"]
            elif record["type"] == "history":
                item = record["history"]["item"]
                if STEP_METRIC in item:
                    logged = {k: v for k, v in item.items() if k[0] != "_" and not isinstance(v, str)}
                    step = logged.pop(STEP_METRIC)
                    history.append({**logged, "step": step})
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{log.name} is not the log of a run of this program") from error
    return config, history


def last_logged_step(folder: Path, run_id: str) -> int | None:
    """Return the last meta-step that the logs of a run hold; `None` where there is no log at all.

    A process that was killed has written less than it had handed to W&B, so the log is asked.
    """
    logs = [
        log for run in find_wandb_logs(folder).values() for log in run if log.stem == f"run-{run_id}"
    ]
    for log in reversed(logs):
        _, history = read_wandb_log(log)
        if history:
            return int(history[-1]["step"])
    return -1 if logs else None
