"""The logs that W&B leaves on disk, one for each time that a run was started or resumed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking.wandb_internals import is_offline, read_records
from maml_pipeline.run_folder import WANDB_LOG

STEP_METRIC = "meta_step"
"""The x-axis of every metric: the index of the meta-step, from 0."""


def find_wandb_logs(folder: Path) -> dict[str, list[Path]]:
    """Return the W&B logs in or below a folder by run, those of a resumed run in order."""
    return group_wandb_logs(folder.rglob(WANDB_LOG))


def group_wandb_logs(logs: Iterable[Path]) -> dict[str, list[Path]]:
    """Return W&B logs by run, those of a resumed run in order."""
    runs: dict[str, list[Path]] = {}
    # .../wandb/offline-run-20261124_030330-f76e1feb/run-f76e1feb.wandb: sorted by the time in the name.
    found = {path.resolve() for path in logs}
    for log in sorted(found, key=_start_order):
        runs.setdefault(str(log.parent.parent / log.stem), []).append(log)
    return runs


def _start_order(log: Path) -> tuple[str, bool, Path]:
    # In the same second, an offline log replaces that of an attempt to reach the server.
    return log.parent.name.removeprefix("offline-"), is_offline(log), log


def read_wandb_log(log: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Read a W&B log, also of a run that is still active.

    Args:
        log: A file `run-<id>.wandb`.

    Returns:
        The config, and the logged rows in order, each with its meta-step under `step`.

    Raises:
        UserError: W&B cannot read the file, or it is not the log of a run of this program.
    """
    config: dict[str, Any] = {}
    history = []
    try:
        for record in read_records(log):
            if record["type"] == "run":
                config = record["run"]["config"]["update"]
            elif record["type"] == "history":
                item = record["history"]["item"]
                if STEP_METRIC in item:
                    row = {k: v for k, v in item.items() if k[0] != "_" and not isinstance(v, str)}
                    step = row.pop(STEP_METRIC)
                    history.append({**row, "step": step})
    except UserError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{log.name} is not the log of a run of this program") from error
    return config, history


def last_logged_step(folder: Path, run_id: str) -> int | None:
    """Return the last meta-step in a run's logs; -1 if they have none, `None` if there is no log.

    A killed process may have written less than it logged, so only the logs tell.
    """
    name = f"run-{run_id}"
    logs = [log for run in find_wandb_logs(folder).values() for log in run if log.stem == name]
    for log in reversed(logs):
        _, history = read_wandb_log(log)
        if history:
            return int(history[-1]["step"])
    return -1 if logs else None
