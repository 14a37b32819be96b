"""What the methods of computing a meta-gradient share: inner steps and gradients of a chunk of tasks."""

from typing import NamedTuple

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import Parameters


class ChunkGradient(NamedTuple):
    """Losses `(T, k + 1)`, query predictions `(T, Q, ...)` and the meta-gradient summed over tasks."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


def inner_step(
    chunk_loss: ChunkLoss, parameters: Parameters, x: Tensor, y: Tensor, lr: float
) -> tuple[Parameters, Tensor]:
    """Take one step of gradient descent on each task; return the losses before it, `(T,)`.

    Only adapted parameters move, and only their gradient is computed.
    """
    detached = {name: p.detach() for name, p in parameters.items()}
    adapted = {name: p.requires_grad_() for name, p in chunk_loss.of_adapted(detached).items()}
    losses, _ = chunk_loss(detached, x, y)
    slope = gradient(losses, adapted)
    moved = {name: p.detach() - lr * slope[name] for name, p in adapted.items()}
    return detached | moved, losses.detach()


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
