"""Check the outer optimizer and its schedule by trying one step on copies of the parameters."""

from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import OneCycleLR

from maml_pipeline.cli.checks.blame import refusal
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner
from maml_pipeline.learner.learned_inner_lr import parameter_groups


def check_optimization(
    model: MetaLearner, settings: Namespace, monitored: list[str], on_cpu: bool
) -> None:
    """Refuse an optimizer or a schedule with which training would fail.

    Args:
        model: The model; its parameters and optimizer are not changed.
        settings: The parsed configuration.
        monitored: Names of the metrics that a validation logs.
        on_cpu: Whether training will run on the CPU, as this check does.

    Raises:
        UserError: It cannot be built or take a step, ends too early, or monitors an unlogged metric.
    """
    optimizer = _checked_optimizer(model, settings.model.optimizer, on_cpu)
    if model.lr_scheduler is None:
        return
    scheduler = _checked_schedule(model, optimizer, settings.model.lr_scheduler)
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.monitor not in monitored:
        raise UserError(
            f"model.lr_scheduler: {name} monitors {scheduler.monitor}; a validation logs "
            f"{', '.join(monitored[:4])}, ..."
        )
    if settings.ckpt_path is None:  # a run that exists was trained so
        _check_learned_rates(model, settings.model.lr_scheduler, name)
    max_steps = settings.trainer.max_steps
    # OneCycleLR raises in the step after its last one.
    if isinstance(scheduler, OneCycleLR) and not 0 <= max_steps <= scheduler.total_steps:
        raise UserError(
            f"model.lr_scheduler: the total_steps of {name} are {scheduler.total_steps}, but "
            f"trainer.max_steps is {max_steps}; the schedule must be as long as the training"
        )


def _check_learned_rates(model: MetaLearner, spec: Any, name: str) -> None:
    """Refuse a schedule that sets the outer learning rate of the learned rates to the network's."""
    rates, given = model.learned_inner_lr, spec.get("init_args") or {}
    for key in ("max_lr", "base_lr"):
        value = given.get(key)
        if rates is not None and isinstance(value, float | int) and value != rates.lr:
            raise UserError(
                f"model.lr_scheduler.{key} is {value:g}, which {name} takes for the learned rates, too, "
                f"in place of learned_inner_lr.lr {rates.lr:g}; give both, '[{value:g}, {rates.lr:g}]'"
            )


def _checked_schedule(model: MetaLearner, optimizer: Optimizer, spec: Any) -> Any:
    """Build the schedule and take one step."""

    def use(build: Any, **arguments: Any) -> Any:
        scheduler = build(optimizer, **arguments)
        _step(optimizer)  # before the schedule's, as PyTorch requires
        is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(0.0) if is_plateau else scheduler.step()
        return scheduler

    try:
        return use(model.lr_scheduler)
    except Exception as error:
        raise UserError(refusal("model.lr_scheduler", spec, error, use)) from error


def _checked_optimizer(model: MetaLearner, spec: Any, on_cpu: bool) -> Optimizer:
    """Build the optimizer on copies of the parameters, and take one step with zero gradients."""
    try:
        optimizer = model.optimizer(_copies(model))
        _step(optimizer)
    except Exception as error:
        if isinstance(error, AssertionError) and not on_cpu:
            return optimizer  # `capturable`, which works on the GPU that training will use
        text = refusal(
            "model.optimizer", spec, error, lambda cls, **args: _step(cls(_copies(model), **args))
        )
        raise UserError(text) from error
    return optimizer


def _copies(model: MetaLearner) -> Any:
    """Return what training builds the optimizer from, with copies of the parameters."""
    network = [_copy(p) for p in model.network.parameters() if p.requires_grad]
    rates = None if model.inner_rates is None else _copy(model.inner_rates)
    return parameter_groups(network, rates, model.learned_inner_lr)


def _copy(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().clone().requires_grad_()


def _step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0)
