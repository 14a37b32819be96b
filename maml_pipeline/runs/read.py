"""Reading one run from its folder, its W&B logs or a trade-off's summary."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.metrics_table import MetricsRow, read_metrics
from maml_pipeline.run_folder import CONFIG, METRICS, TEST, TRADEOFF, is_run_folder
from maml_pipeline.runs.run import Run
from maml_pipeline.runs.validation import UnreadableRunError, build_run
from maml_pipeline.text import printable

MAX_BYTES = {CONFIG: 2**18, TEST: 2**20, METRICS: 2**28, TRADEOFF: 2**28}
"""Limits far above what a run writes; a larger file is not read."""


def read_run_folder(folder: Path, unlogged: bool = False) -> Run:
    """Read a run's folder, also of a run that is still active.

    Args:
        folder: It has a config, a metrics table and, once the run is tested, a test result.
        unlogged: Accept a run that has logged nothing yet.

    Raises:
        UnreadableRunError: A file is missing or damaged, or nothing is logged yet.
    """
    config = _parsed(folder / CONFIG, yaml.safe_load)
    try:
        history = _read_history(folder)
    except _NothingLoggedError:
        if not (unlogged and is_run_folder(folder)):
            raise
        history = []
    if not (folder / TEST).exists():
        return build_run(folder, config, history, {})
    test = _parsed(folder / TEST, json.loads)
    run = build_run(folder, config, history, test)
    if run.result is None or run.result.split != "test":
        raise UnreadableRunError(f"{TEST} has no test/{run.measure}")
    return run


class _NothingLoggedError(UnreadableRunError):
    """The metrics table is missing or has no row."""


def _read_history(folder: Path) -> list[MetricsRow]:
    table = folder / METRICS
    if not os.path.lexists(table):
        raise _NothingLoggedError(
            f"there is no {METRICS}: the run is just starting, or was stopped before its first meta-step"
        )
    _check_file(table)
    try:
        history = read_metrics(table)
    except UserError as error:
        raise UnreadableRunError(str(error).replace(f"{folder}/", "")) from error
    except OSError as error:
        raise UnreadableRunError(f"{table.name} cannot be read ({error.strerror})") from error
    if not history:
        raise _NothingLoggedError(f"{METRICS} has no row yet: the run is just starting, or was stopped")
    return history


def read_wandb_run(logs: list[Path]) -> Run:
    """Read one W&B run from its logs, one for each time that it was started or resumed.

    Args:
        logs: In the order of writing.

    Raises:
        UnreadableRunError: W&B cannot read a log, or nothing is logged yet.
    """
    # Imported late: it imports PyTorch, which takes seconds.
    from maml_pipeline.learner.tracking import read_wandb_log

    config: dict[str, Any] = {}
    history: list[MetricsRow] = []
    for log in logs:
        try:
            own_config, records = read_wandb_log(log)
        except UserError as error:
            raise UnreadableRunError(str(error)) from error
        config = own_config or config
        if records:
            # A killed run had logged meta-steps after its last checkpoint, which it then trained again.
            history = [r for r in history if r["step"] < records[0]["step"]] + records
    if not config or not history:
        raise UnreadableRunError("the W&B log has no metrics of a run of this program")
    # A finished run may have been resumed for more meta-steps: its test was of an earlier checkpoint.
    trained = max((n for n, record in enumerate(history) if not _is_test(record)), default=-1)
    history = [record for n, record in enumerate(history) if n > trained or not _is_test(record)]
    test = {key: value for record in history for key, value in record.items() if key.startswith("test/")}
    return build_run(logs[-1].parent, config, history, test)


def _is_test(record: MetricsRow) -> bool:
    return any(key.startswith("test/") for key in record)


def read_tradeoff(file: Path) -> Iterator[tuple[Path, Callable[[], Run]]]:
    """Read the cells in a trade-off's summary.

    Args:
        file: Any file.

    Yields:
        For each cell a path below the file, and a function that reads the cell.

    Raises:
        UnreadableRunError: The file is not a trade-off's summary.
    """
    content = _parsed(file, json.loads)
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise UnreadableRunError(f"it is not a {TRADEOFF}")
    for number, cell in enumerate(content["cells"]):
        folder = cell.get("folder") if isinstance(cell, dict) else None
        source = file / (folder if isinstance(folder, str) and folder else str(number))
        yield source, lambda source=source, cell=cell: _read_cell(source, cell)  # type: ignore[misc]


def _read_cell(source: Path, cell: Any) -> Run:
    if not isinstance(cell, dict) or not isinstance(cell.get("history"), list):
        raise UnreadableRunError("it is not a cell with config, history and test")
    run = build_run(source, cell.get("config"), cell["history"], cell.get("test"))
    return replace(run, is_known_to_diverge=cell.get("diverged") is True)


# Files ------------------------------------------------------------------------------------------


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    _check_file(file)
    most = MAX_BYTES.get(file.name, MAX_BYTES[TRADEOFF])
    try:
        with file.open("rb") as opened:
            content = opened.read(most + 1)  # files in /proc report a size of 0 bytes
    except OSError as error:
        raise UnreadableRunError(f"{printable(file.name)} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise UnreadableRunError(f"{printable(file.name)} is larger than any file of a run")
    if not content.strip():
        raise UnreadableRunError(f"{printable(file.name)} is empty")
    try:
        return parse(content.decode())
    # YAML's constructors pass on the errors of Python's conversions.
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError, RecursionError) as error:
        kind = {json.loads: "JSON", yaml.safe_load: "YAML"}[parse]
        raise UnreadableRunError(f"{printable(file.name)} is not {kind}") from error


def _check_file(file: Path) -> None:
    """Check that a path exists, is a regular file (reading a pipe would block), and is not huge."""
    name = printable(file.name)
    try:
        status = file.stat()
    except OSError as error:
        raise UnreadableRunError(f"there is no {name}: it is not a run, or is damaged") from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableRunError(f"{name} is not a file")
    if status.st_size > MAX_BYTES.get(file.name, MAX_BYTES[TRADEOFF]):
        raise UnreadableRunError(f"{name} is larger than any file of a run")
