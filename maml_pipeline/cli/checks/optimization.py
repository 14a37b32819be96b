"""The outer optimiser and its schedule: built and tried once on copies of the parameters."""

from typing import Any

import torch
from pytorch_lightning.cli import ReduceLROnPlateau
from torch.optim import Optimizer

from maml_pipeline.cli.checks.trainer import first_line
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner


def check_optimization(model: MetaLearner, max_steps: int, monitored: list[str]) -> None:
    """Refuse an optimiser or a schedule with which training would end in an error.

    Args:
        model: Neither its parameters nor its optimiser are touched.
        max_steps: Meta-steps of the training; -1 for no end.
        monitored: Names of what a validation logs.

    Raises:
        UserError: It cannot be built, cannot take a step, ends too early or watches what is not logged.
    """
    optimizer = _try_optimizer(model)
    if model.lr_scheduler is None:
        return
    try:
        scheduler: Any = model.lr_scheduler(optimizer)
    except Exception as error:
        raise UserError(f"model.lr_scheduler cannot be built: {first_line(error)}") from error
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.monitor not in monitored:
        raise UserError(
            f"model.lr_scheduler: {name} watches monitor {scheduler.monitor}; a validation logs "
            f"{', '.join(monitored[:4])}, ..."
        )
    # OneCycleLR raises in the step after its last one.
    total_steps = getattr(scheduler, "total_steps", None)
    if isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR) and not 0 < max_steps <= total_steps:
        raise UserError(
            f"model.lr_scheduler: the total_steps of {name} are {total_steps}, but trainer.max_steps is "
            f"{max_steps}; set total_steps to at least that"
        )


def _try_optimizer(model: MetaLearner) -> Optimizer:
    """Build the optimiser on copies of the parameters, and take a step with a gradient of zero."""
    copies = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    try:
        optimizer = model.optimizer(copies)
        for parameter in copies:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(lambda: 0.0)
    except AssertionError:
        pass  # `capturable`, which works on the GPU that the parameters will be on
    except Exception as error:
        raise UserError(f"model.optimizer cannot be used: {first_line(error)}") from error
    return optimizer
