"""Where metrics go: a table in the run's folder, and W&B, which is met in this folder alone."""

from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from maml_pipeline.learner.metrics_csv import MetricsCSV
from maml_pipeline.learner.tracking.description import experiment_name, gradient_method
from maml_pipeline.learner.tracking.logs import find_wandb_logs, group_wandb_logs, read_wandb_log
from maml_pipeline.learner.tracking.session import finish_tracking, logged_in
from maml_pipeline.learner.tracking.tracker import StartTracking, WandbTracker
from maml_pipeline.rank import is_rank_zero

__all__ = [
    "StartTracking",
    "WandbTracker",
    "experiment_name",
    "find_wandb_logs",
    "finish_tracking",
    "gradient_method",
    "group_wandb_logs",
    "logged_in",
    "read_wandb_log",
    "run_loggers",
]


def run_loggers(folder: Path, config: dict[str, Any]) -> list[Logger]:
    """Build a run's loggers: `metrics.csv` and W&B, offline unless the person is logged in.

    Args:
        folder: The run's folder; W&B's files lie in it too.
        config: The whole resolved config.
    """
    loggers: list[Logger] = [MetricsCSV(folder)]
    if is_rank_zero():
        loggers.append(WandbTracker(folder, config))
    return loggers
