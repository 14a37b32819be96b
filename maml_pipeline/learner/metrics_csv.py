"""metrics.csv: one table a run, also when the run was stopped and resumed."""

import csv
from io import StringIO
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.files import write_whole


class AppendingWriter(ExperimentWriter):
    """Lightning's writer, which would delete the table that a resumed run finds."""

    def _check_log_dir_exists(self) -> None:
        if self._fs.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Keep a row, without Lightning's count of epochs: there is one, and it has no end."""
        super().log_metrics({k: v for k, v in metrics_dict.items() if k != "epoch"}, step)

    def drop_from(self, step: int) -> None:
        """Drop the rows of `step` and later, which a resumed run is about to write again."""
        if Path(self.metrics_file_path).exists():
            self._write([row for row in self._rows() if int(row["step"]) < step])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(self._rows())

    def _rows(self) -> list[dict[str, str]]:
        with open(self.metrics_file_path, newline="") as file:
            # A kill may have cut the last row short: it has no number in every column up to the last.
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Replace the table at once: a kill leaves the old one or the new one."""
        table = StringIO(newline="")
        writer = csv.DictWriter(table, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(Path(self.metrics_file_path), table.getvalue())


class MetricsCSV(CSVLogger):
    """Write every logged metric to `<folder>/metrics.csv`, at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> AppendingWriter:
        """The open table."""
        if self._experiment is None:
            self._experiment = AppendingWriter(self.log_dir)
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
