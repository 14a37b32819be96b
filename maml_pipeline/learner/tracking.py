"""Where metrics go: a table in the run's folder, and W&B."""

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import Logger, WandbLogger

from maml_pipeline.learner.metrics_csv import MetricsCSV


def run_loggers(folder: Path, name: str, config: dict[str, Any]) -> list[Logger]:
    """Build a run's loggers: `metrics.csv` and W&B, offline unless the person is logged in.

    Args:
        folder: The run's folder; W&B's files lie in it too.
        name: The run's name.
        config: The whole resolved config, for W&B.
    """
    mode = None if "WANDB_MODE" in os.environ or logged_in() else "offline"
    wandb = WandbLogger(name, save_dir=folder, project="maml_pipeline", config=config, mode=mode)
    return [MetricsCSV(folder), wandb]


def logged_in() -> bool:
    """Tell whether W&B has an API key, in the environment or in the netrc file, without network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
