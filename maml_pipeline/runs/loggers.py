"""The loggers of a run: a CSV table in its folder, and W&B."""

from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from maml_pipeline.learner.metrics_csv import MetricsCSV
from maml_pipeline.learner.tracking import WandbTracker
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.run_folder import METRICS, WANDB_ID


def run_loggers(folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Build a run's loggers: its metrics table and, on rank 0, W&B.

    Args:
        folder: The run's folder; W&B writes its files there too.
        config: The whole resolved config.
    """
    metrics = folder / METRICS
    loggers: list[Logger] = [MetricsCSV(metrics)]
    if is_rank_zero():
        loggers.append(WandbTracker(folder, config, id_file=folder / WANDB_ID, metrics_file=metrics))
    return loggers
