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

from maml_pipeline import run_folder
from maml_pipeline.files import write_atomically
from maml_pipeline.metrics_table import MetricsRow, read_metrics


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
    """Truncate metrics.csv to the meta-step from which a run resumes.

    If a run goes back to an earlier checkpoint, that becomes its last one first: a kill before the next
    save would otherwise leave a table that is shorter than the training.
    """

    def __init__(self) -> None:
        self._is_ready = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that a killed run logged after its last checkpoint."""
        self._go_back(trainer)
        self._drop(trainer)
        self._is_ready = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back with nothing left to train: then no training starts, and a test follows."""
        if not self._is_ready:
            self._go_back(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the test result of a run that was killed after its test, with nothing left to train."""
        self._drop(trainer)

    @rank_zero_only
    def _go_back(self, trainer: Trainer) -> None:
        source = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and source is not None:
                last = run_folder.checkpoint_path(logger.path.parent, "last")
                is_own = source.resolve().parent == last.resolve().parent
                if is_own and source.resolve() != last.resolve():
                    for result in (run_folder.TEST, run_folder.VALIDATION):
                        (logger.path.parent / result).unlink(missing_ok=True)
                    write_atomically(last, source.read_bytes())

    @rank_zero_only
    def _drop(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.experiment.drop_from(trainer.global_step)
