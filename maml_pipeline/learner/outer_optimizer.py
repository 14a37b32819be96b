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


def release_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set the gradients of an optimizer to `None`.

    The same as PyTorch's `zero_grad`, without its entry in PyTorch's profiler, which takes longer than
    all the rest. An optimizer with a `zero_grad` of its own gets that called.
    """
    has_own = type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad
    if has_own or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


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
