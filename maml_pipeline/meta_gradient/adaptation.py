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
    learned rate share it. Nothing is kept or added if no rates are learned.

    Attributes:
        total: By parameter name, `(n,)`, summed over tasks.
    """

    def __init__(self, inner: InnerLoop) -> None:
        self.total = {name: torch.zeros_like(r) for name, r in (inner.rates or {}).items()}
        self._kept: list[tuple[int, Parameters]] = []

    def add(self, t: int, slope: Parameters, adjoint: Parameters) -> None:
        """Add inner step t of all tasks of a chunk."""
        for name, sums in self.total.items():
            sums[min(t, len(sums) - 1)] -= (slope[name] * adjoint[name]).sum()

    def keep(self, t: int, slope: Parameters) -> None:
        """Keep the gradient of a step that is not differentiated, until its adjoint is known."""
        if self.total:
            self._kept.append((t, slope))

    def add_kept(self, adjoint: Parameters) -> None:
        """Add the steps that were kept: the adjoint is the same for all of them."""
        for t, slope in self._kept:
            self.add(t, slope, adjoint)
        self._kept.clear()
