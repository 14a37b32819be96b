"""metrics.csv: one table per run, including runs that were stopped and resumed."""

import csv
import os
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically

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


class AppendingWriter(ExperimentWriter):
    """Lightning's writer, which alone would delete the table of a resumed run."""

    def __init__(self, path: Path) -> None:
        self.NAME_METRICS_FILE = path.name  # Lightning's own name for the attribute
        super().__init__(str(path.parent))

    def _check_log_dir_exists(self) -> None:
        self._take_columns(read_metrics(Path(self.metrics_file_path)))

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Keep a row for `save`, without Lightning's epoch: there is a single endless one."""
        super().log_metrics({k: v for k, v in metrics_dict.items() if k != "epoch"}, step)

    def save(self) -> None:
        """Append the rows that were kept; for a new column, replace the table atomically."""
        # Lightning saves again at the end of a run, which must not retry rows that failed.
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        path = Path(self.metrics_file_path)
        if path.exists() and set().union(*rows) <= {*self.metrics_keys}:
            _append(path, self._text(rows))
        else:
            self._replace([*read_metrics(path), *rows])

    def drop_from(self, step: int) -> None:
        """Drop the rows from `step` on, which a resumed run is about to write again."""
        path = Path(self.metrics_file_path)
        if path.exists():
            self._replace([row for row in read_metrics(path) if row["step"] < step])

    def _replace(self, rows: Sequence[MetricsRow]) -> None:
        self._take_columns(rows)
        header = self._text([dict(zip(self.metrics_keys, self.metrics_keys, strict=True))])
        write_atomically(Path(self.metrics_file_path), header + self._text(rows))

    def _take_columns(self, rows: Iterable[MetricsRow]) -> None:
        self.metrics_keys = sorted(set().union(*rows))

    def _text(self, rows: Iterable[dict[str, float] | dict[str, str]]) -> str:
        text = StringIO(newline="")
        csv.DictWriter(text, self.metrics_keys).writerows(rows)
        return text.getvalue()


def _append(path: Path, text: str) -> None:
    """Append to a file; undo a partial append if writing fails."""
    with path.open("rb+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            remaining = text.encode()
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError as error:  # a full disk
            file.truncate(size)
            error.filename = error.filename or str(path)
            raise


class MetricsCSV(CSVLogger):
    """Write every logged metric to a CSV table immediately.

    Args:
        path: The table.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent, name="", version="", flush_logs_every_n_steps=1)
        self.path = path

    @property
    def experiment(self) -> AppendingWriter:
        """The writer of the table."""
        if self._experiment is None:
            self._experiment = AppendingWriter(self.path)
        assert isinstance(self._experiment, AppendingWriter)
        return self._experiment


class DropRepeatedRows(Callback):
    """Truncate metrics.csv to the meta-step from which a run resumes."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that a killed run logged after its last checkpoint."""
        self._drop(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the test result of a run that was killed after its test, with nothing left to train."""
        self._drop(trainer)

    @rank_zero_only
    def _drop(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.experiment.drop_from(trainer.global_step)
