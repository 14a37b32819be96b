"""metrics.csv: one table a run, also when the run was stopped and resumed."""

import csv
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only


class AppendingWriter(ExperimentWriter):
    """Lightning's writer, which would delete the table that a resumed run finds."""

    def _check_log_dir_exists(self) -> None:
        if self._fs.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def drop_from(self, step: int) -> None:
        """Drop the rows of `step` and later, which a resumed run is about to write again."""
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)


class MetricsCSV(CSVLogger):
    """Write every logged metric to `<folder>/metrics.csv`, at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> AppendingWriter:
        """The open table; on ranks above 0 it is made too, but never written."""
        if self._experiment is None:
            self._experiment = AppendingWriter(self.log_dir)
        assert isinstance(self._experiment, AppendingWriter)
        return self._experiment


class DropRepeatedRows(Callback):
    """Cut metrics.csv back to the meta-step that a resumed run starts from."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows between the checkpoint and the moment the run was killed."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.experiment.drop_from(trainer.global_step)
