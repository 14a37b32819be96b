"""Reading metrics.csv, the table of everything that a run has logged, without PyTorch or Lightning."""

import csv
from pathlib import Path

from maml_pipeline.errors import UserError

MetricsRow = dict[str, float]
"""The values logged at one meta-step, by metric; `step` is the meta-step, an integer from 0."""

TAIL_BYTES = 20_000
"""Enough for several rows of any run."""


def read_metrics(path: Path) -> list[MetricsRow]:
    """Read a run's `metrics.csv`, also while it is being written or after its process was killed.

    Args:
        path: The table.

    Returns:
        The rows in order, without empty cells and without an incomplete last row; empty if there is no
        table.

    Raises:
        UserError: A row other than the last is damaged, which no interrupted run causes.
    """
    try:
        lines = _whole_lines(path.read_bytes())
    except FileNotFoundError:
        return []
    if not lines:
        return []
    rows = [_parse(lines[0], line) for line in lines[1:]]
    if None in rows[:-1]:
        raise UserError(
            f"{path} is damaged in line {rows.index(None) + 2}: each cell must be a number or empty; "
            "delete that line, or restore the file"
        )
    return [row for row in rows if row is not None]


def read_last_row(path: Path) -> MetricsRow | None:
    """Read the last complete row of a run's `metrics.csv`, in constant time for any length.

    Args:
        path: The table.

    Returns:
        The row; `None` if there is none.
    """
    try:
        with path.open("rb") as file:
            header = file.readline()
            start = max(file.tell(), path.stat().st_size - TAIL_BYTES)
            file.seek(start)
            tail = file.read()
    except FileNotFoundError:
        return None
    names = _whole_lines(header)
    # The first line of the tail may lack its beginning, and the last line its end.
    lines = _whole_lines(tail)[start > len(header) :]
    rows = [row for line in lines[-2:] if names and (row := _parse(names[0], line)) is not None]
    return rows[-1] if rows else None


def _whole_lines(content: bytes) -> list[str]:
    """Return the complete lines, without a last line that does not end."""
    whole, _, _ = content.rpartition(b"\n")
    return whole.decode(errors="replace").splitlines()


def _parse(header: str, line: str) -> MetricsRow | None:
    """Return the cells that are not empty; `None` if the line is not a row."""
    try:
        names, cells = csv.reader([header, line])
        row = {name: _number(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except (ValueError, csv.Error):
        return None
    return row if isinstance(row.get("step"), int) else None


def _number(text: str) -> float:
    """Convert a cell so that it is written as it was read: an integer stays an integer."""
    return int(text) if text.isdecimal() else float(text)
