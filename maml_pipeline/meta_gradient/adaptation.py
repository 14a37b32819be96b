"""Inner steps of a group of tasks at once.

Every parameter carries a leading dimension G, each task's own. Tasks do not meet, so the gradient of
the summed losses is each task's gradient, and autograd alone differentiates: the derivatives of
every operation are PyTorch's ordinary ones, exact to any order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.inner_loop import Parameters

GroupLoss = Callable[[Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(parameters `(G, ...)`, inputs `(G, S, ...)`, targets) -> losses `(G,)`, predictions `(G, S, ...)`."""


def expand(theta: Parameters, tasks: int) -> Parameters:
    """Give every task the same parameters, without a copy: `(...)` -> `(G, ...)`."""
    return {name: p.expand(tasks, *p.shape) for name, p in theta.items()}


def gradient(losses: Tensor, parameters: Parameters, create_graph: bool = False) -> Parameters:
    """Differentiate every task's loss `(G,)`; what it does not depend on gets zeros."""
    # materialize_grads would turn each unused gradient into one that seems to be used.
    gradients = torch.autograd.grad(
        losses.sum(), list(parameters.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def loss_and_gradient(
    group_loss: GroupLoss, parameters: Parameters, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Parameters]:
    """Return the losses `(G,)`, the predictions and the gradient, all without a graph."""
    parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    losses, prediction = group_loss(parameters, x, y)
    return losses.detach(), prediction.detach(), gradient(losses, parameters)


def inner_step(
    group_loss: GroupLoss, parameters: Parameters, x: Tensor, y: Tensor, lr: float
) -> tuple[Parameters, Tensor]:
    """Take one step of gradient descent on every task, and return the losses before it `(G,)`."""
    losses, _, step = loss_and_gradient(group_loss, parameters, x, y)
    return {name: p.detach() - lr * step[name] for name, p in parameters.items()}, losses
