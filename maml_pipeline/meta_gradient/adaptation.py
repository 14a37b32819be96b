"""What the methods of computing a meta-gradient share: inner steps and gradients of a chunk of tasks."""

from typing import NamedTuple

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters


class ChunkGradient(NamedTuple):
    """Losses `(T, k + 1)`, query predictions `(T, Q, ...)` and the meta-gradient summed over tasks."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters
    rates: Parameters
    """The gradient of learned inner learning rates `(n,)`, also summed; empty if none are learned."""


def inner_step(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor, inner: InnerLoop, t: int
) -> tuple[Parameters, Tensor, Parameters]:
    """Take inner step t on each task; return the losses `(T,)` and the gradient before it.

    Only adapted parameters move, and only their gradient is computed.
    """
    losses, slope = support_gradient(chunk_loss, parameters, x, y)
    moved = {name: parameters[name].detach() - inner.rate(t, name) * g for name, g in slope.items()}
    return parameters | moved, losses, slope


def support_gradient(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Parameters]:
    """Return the losses `(T,)` and the gradient of the adapted parameters, detached."""
    detached = {name: p.detach() for name, p in parameters.items()}
    adapted = {name: p.requires_grad_() for name, p in chunk_loss.of_adapted(detached).items()}
    losses, _ = chunk_loss(detached, x, y)
    return losses.detach(), gradient(losses, adapted)


def loss_and_gradient(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Parameters]:
    """Return the losses `(T,)`, the predictions and the gradient of all parameters, detached."""
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    losses, prediction = chunk_loss(parameters, x, y)
    return losses.detach(), prediction.detach(), gradient(losses, parameters)


def gradient(losses: Tensor, parameters: Parameters, create_graph: bool = False) -> Parameters:
    """Differentiate the sum of losses `(T,)`; parameters that it does not depend on get zeros."""
    if not losses.requires_grad:  # the loss depends on none of them
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    # materialize_grads would give unused parameters gradients that require a gradient.
    gradients = torch.autograd.grad(
        losses.sum(), list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


class RateGradient:
    """The gradient of learned inner learning rates: -<a_{t+1}, g_t> for each parameter and inner step t.

    a_{t+1} is the adjoint after the step and g_t the support gradient in it. Steps beyond the last
    learned rate share it.
    """

    def __init__(self, inner: InnerLoop) -> None:
        self._sums = {name: torch.zeros_like(r) for name, r in (inner.rates or {}).items()}

    def add(self, t: int, slope: Parameters, adjoint: Parameters) -> None:
        """Add inner step t of all tasks of a chunk."""
        for name, sums in self._sums.items():
            sums[min(t, len(sums) - 1)] -= (slope[name] * adjoint[name]).sum()

    def result(self) -> Parameters:
        """Return the gradient by parameter name, `(n,)`, summed over tasks."""
        return self._sums
