"""Reject networks that read their parameters' storage instead of the parameters themselves."""

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.exactness.preservation import (
    RandomState,
    preserve_attributes,
    preserve_state,
)
from maml_pipeline.meta_gradient.exactness.state import ROUNDING, prediction_and_loss, relative_distance
from maml_pipeline.meta_gradient.inner_loop import Loss
from maml_pipeline.tasks import Task


def check_storage(network: nn.Module, loss: Loss, task: Task) -> None:
    """Reject a network that reads a view or `.data` of a parameter, made before the call.

    Such a view follows an optimizer, which writes in place, but no engine, which passes other tensors.

    Raises:
        UserError: The prediction depends on whether parameters are overwritten or replaced.
    """
    with torch.no_grad():
        theta = _perturbed(network)
        state = RandomState(task.support_x.device)
        with preserve_state(network):  # parameters replaced
            replaced = _call_at(network, loss, theta, task)
        state.restore()
        saved = [p.detach().clone() for p in network.parameters()]
        with preserve_attributes([*network.modules()]):  # parameters overwritten
            try:
                overwritten = _call_at(network, loss, theta, task)
            finally:
                for p, value in zip(network.parameters(), saved, strict=True):
                    p.data.copy_(value)
    if relative_distance(replaced, overwritten) > ROUNDING:
        raise UserError(
            f"network {type(network).__name__} reads its parameters through a view or .data made "
            "before the call: read the parameters themselves in each call"
        )


def check_copy(network: nn.Module, duplicate: nn.Module, loss: Loss, task: Task) -> None:
    """Reject a copy of a network that still refers to the network's parameters.

    Raises:
        TypeError: The two predict differently with the same parameters.
    """
    with torch.no_grad():
        theta = _perturbed(network)
        state = RandomState(task.support_x.device)
        losses = []
        for subject in (network, duplicate):
            state.restore()
            with preserve_state(subject):
                losses.append(_call_at(subject, loss, theta, task))
    if relative_distance(*losses) > ROUNDING:
        raise TypeError("a copy of the network refers to parameters of the network itself")


def _perturbed(network: nn.Module) -> list[Tensor]:
    """Return the parameters with noise of a tenth of their size."""
    generator = torch.Generator().manual_seed(0)
    perturbed = []
    for p in network.parameters():
        size = p.abs().square().mean().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        perturbed.append(p + 0.1 * size * torch.randn(p.shape, generator=generator).to(p))
    return perturbed


def _call_at(network: nn.Module, loss: Loss, theta: list[Tensor], task: Task) -> Tensor:
    for p, value in zip(network.parameters(), theta, strict=True):
        p.data.copy_(value)
    return prediction_and_loss(network, loss, task)
