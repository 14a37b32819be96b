"""metrics.csv: one table a run, also when the run was stopped and resumed."""

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
"""What was logged at one meta-step, by metric; `step` is the meta-step, a whole number from 0."""

TAIL_BYTES = 20_000
"""Enough for several rows of any run."""


def read_metrics(path: Path) -> list[MetricsRow]:
    """Read a run's `metrics.csv`, also while it is written or after its process was killed.

    Args:
        path: The table.

    Returns:
        Its rows in order, without empty cells. A last row that was cut short is left out. No row where
        there is no table.

    Raises:
        UserError: An earlier row is damaged, which no interrupted run leaves behind.
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
            f"{path} is damaged in line {rows.index(None) + 2}: it does not hold a number or nothing in "
            "each column; delete that line, or restore the file"
        )
    return [row for row in rows if row is not None]


def read_last_row(path: Path) -> MetricsRow | None:
    """Read the last whole row of a run's `metrics.csv`, in the same time for a table of any length.

    Args:
        path: The table.

    Returns:
        The row, or `None` where there is none.
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
    # The first line of the tail may lack its beginning, and the last its end.
    lines = _whole_lines(tail)[start > len(header) :]
    rows = [row for line in lines[-2:] if names and (row := _parse(names[0], line)) is not None]
    return rows[-1] if rows else None


def _whole_lines(content: bytes) -> list[str]:
    """Return the lines that were written to their end."""
    whole, _, _ = content.rpartition(b"\n")
    return whole.decode(errors="replace").splitlines()


def _parse(header: str, line: str) -> MetricsRow | None:
    """Return the cells that are not empty; `None` where they are not those of a row."""
    try:
        names, cells = csv.reader([header, line])
        row = {name: _number(cell) for name, cell in zip(names, cells, strict=True) if cell}
    except (ValueError, csv.Error):
        return None
    return row if isinstance(row.get("step"), int) else None


def _number(text: str) -> float:
    """Return a number that is written again as it was read: an integer stays one."""
    return int(text) if text.isdecimal() else float(text)


class AppendingWriter(ExperimentWriter):
    """Lightning's writer, which would delete the table that a resumed run finds."""

    def __init__(self, path: Path) -> None:
        self.NAME_METRICS_FILE = path.name  # Lightning's own name for the attribute
        super().__init__(str(path.parent))

    def _check_log_dir_exists(self) -> None:
        self._take_columns(read_metrics(Path(self.metrics_file_path)))

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Keep a row, without Lightning's count of epochs: there is one, and it has no end."""
        super().log_metrics({k: v for k, v in metrics_dict.items() if k != "epoch"}, step)

    def save(self) -> None:
        """Append the rows that were kept; a new column replaces the table in one step."""
        # Lightning asks again at the end of a run. A row that could not be written is not tried twice.
        rows, self.metrics = self.metrics, []
        if not rows:
            return
        path = Path(self.metrics_file_path)
        if path.exists() and set().union(*rows) <= {*self.metrics_keys}:
            _append(path, self._text(rows))
        else:
            self._replace([*read_metrics(path), *rows])

    def drop_from(self, step: int) -> None:
        """Drop the rows of `step` and later, which a resumed run is about to write again."""
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
    """Append to a file all or nothing, as far as the system lets it."""
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
        """The open table."""
        if self._experiment is None:
            self._experiment = AppendingWriter(self.path)
        assert isinstance(self._experiment, AppendingWriter)
        return self._experiment


class DropRepeatedRows(Callback):
    """Cut metrics.csv back to the meta-step that a resumed run starts from."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows between the checkpoint and the moment the run was killed."""
        self._drop(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the test of a run that was killed after it, and had nothing left to train."""
        self._drop(trainer)

    @rank_zero_only
    def _drop(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.experiment.drop_from(trainer.global_step)
