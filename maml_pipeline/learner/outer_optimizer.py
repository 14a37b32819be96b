"""The outer optimizer, and the schedule of its learning rate."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Build Adam with the paper's outer learning rate, 1e-3, as one fused kernel."""
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return Lightning's settings of a schedule that is stepped once per meta-step.

    Lightning never steps ReduceLROnPlateau; `step_plateau_schedulers` does, after each validation.
    """
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"monitor": getattr(scheduler, "monitor", "val/loss"), "frequency": sys.maxsize}
    return config


def step_plateau_schedulers(trainer: Trainer, results: Mapping[str, float]) -> None:
    """Step schedules that monitor a validation result.

    Called before the state is saved: Lightning would step them afterwards, and a resumed run would miss
    that step.

    Args:
        trainer: The trainer.
        results: The validation's results, by name.
    """
    if trainer.state.fn != "fit" or trainer.sanity_checking:
        return
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor is not None:
            config.scheduler.step(results[config.monitor])  # type: ignore[arg-type]
