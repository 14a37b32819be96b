"""Tracking a run in Weights & Biases: description, session, metrics, and the logs it leaves on disk.

The W&B id file and the metrics table of a run are passed in as paths.
"""

from maml_pipeline.learner.tracking.logs import find_wandb_logs, group_wandb_logs, read_wandb_log
from maml_pipeline.learner.tracking.session import finish_tracking, logged_in
from maml_pipeline.learner.tracking.tracker import StartTracking, WandbTracker

__all__ = [
    "StartTracking",
    "WandbTracker",
    "find_wandb_logs",
    "finish_tracking",
    "group_wandb_logs",
    "logged_in",
    "read_wandb_log",
]
