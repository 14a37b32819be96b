"""Runs as they lie on disk, finished or not, wherever they were trained."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import ORDERS, read_wandb_log, wandb_logs
from maml_pipeline.tools.run import Record, Run


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run that lies in or below some paths.

    Args:
        paths: Run folders, folders of them, W&B's offline runs, or files `tradeoff.json`.

    Returns:
        Sorted by experiment, inner steps, order and seed.

    Raises:
        UserError: There is none below a path, or one cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        found = {run.source.resolve(): run for run in _find(path)}
        if not found:
            raise UserError(
                f"{path} holds no run: a run has config.yaml and metrics.csv, or is one of W&B's "
                "offline-run-* folders, or a tradeoff.json"
            )
        runs |= found
    return sorted(
        runs.values(), key=lambda r: (r.experiment, r.inner_steps, ORDERS.index(r.order), r.seed)
    )


def _find(path: Path) -> Iterator[Run]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run's folder, or one that holds runs")
    if path.is_file():
        yield from _from_tradeoff(path)
        return
    folders = [
        file.parent for file in path.rglob("metrics.csv") if (file.parent / "config.yaml").exists()
    ]
    yield from map(_from_folder, folders)
    # A run's folder holds W&B's log of it too, which says the same.
    strays = {
        run: logs
        for run, logs in wandb_logs(path).items()
        if not any(folder.resolve() in logs[0].parents for folder in folders)
    }
    for logs in strays.values():
        yield _from_wandb(logs)
    if not folders and not strays:
        for file in path.rglob("tradeoff.json"):
            yield from _from_tradeoff(file)


def _from_folder(folder: Path) -> Run:
    with (folder / "metrics.csv").open(newline="") as file:
        # A run that is just writing, or was killed as it was, leaves the last row short.
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    test_file = folder / "test.json"
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        test = json.loads(test_file.read_text()) if test_file.exists() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    history = [{name: float(value) for name, value in row.items() if value} for row in rows]
    return _checked(folder, config, history, test)


def _from_wandb(logs: list[Path]) -> Run:
    """Read one W&B run, which has a log for each time that it was resumed."""
    history: list[Record] = []
    for log in logs:
        config, records = read_wandb_log(log)
        if records:
            # Between its last checkpoint and its kill, a run had logged what it then did again.
            history = [r for r in history if r["step"] < records[0]["step"]] + records
    test = {key: value for record in history for key, value in record.items() if key.startswith("test/")}
    return _checked(logs[-1].parent, config, history, test)


def _from_tradeoff(file: Path) -> Iterator[Run]:
    try:
        cells = json.loads(file.read_text())["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a tradeoff.json; give a run's folder") from error
    for number, cell in enumerate(cells):
        yield _checked(file / str(number), cell["config"], cell["history"], cell["test"])


def _checked(source: Path, config: dict[str, Any], history: list[Record], test: dict[str, float]) -> Run:
    run = Run(source, config, history, test)
    try:
        _ = run.name, run.experiment, run.monitor, run.higher_is_better, run.max_steps
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} is not a run of this program: its config has no {error}") from error
    return run
