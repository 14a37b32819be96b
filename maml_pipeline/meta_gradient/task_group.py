"""One meta-gradient of a group of tasks, written for all of them together."""

from typing import NamedTuple

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import (
    GroupLoss,
    expand,
    gradient,
    inner_step,
    loss_and_gradient,
)
from maml_pipeline.meta_gradient.checkpointed import KeptParameters, walk_back
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.tasks import TaskBatch


class GroupGradient(NamedTuple):
    """A group's losses `(G, k + 1)`, query predictions `(G, Q, ...)` and summed meta-gradient."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


def group_gradient(
    group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> GroupGradient:
    """Compute the sum over G tasks of the gradient of the query loss after adaptation.

    Args:
        group_loss: The losses of all tasks at once.
        theta: Initial parameters, which all tasks share.
        batch: G tasks.
        inner: How to adapt, and the gradient order.
    """
    if inner.first_order or inner.checkpointed:
        return _with_kept_parameters(group_loss, theta, batch, inner)
    return _unrolled(group_loss, theta, batch, inner)


def _unrolled(
    group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> GroupGradient:
    """Differentiate through the whole inner loop, whose graph grows with every step."""
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    adapted, losses = expand(theta, len(batch.support_x)), []
    for _ in range(inner.steps):
        support_loss, _ = group_loss(adapted, batch.support_x, batch.support_y)
        step = gradient(support_loss, adapted, create_graph=True)
        adapted = {name: p - inner.lr * step[name] for name, p in adapted.items()}
        losses.append(support_loss.detach())

    query_loss, prediction = group_loss(adapted, batch.query_x, batch.query_y)
    losses.append(query_loss.detach())
    return GroupGradient(torch.stack(losses, dim=1), prediction.detach(), gradient(query_loss, theta))


def _with_kept_parameters(
    group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> GroupGradient:
    """Adapt without a graph; second order then walks back over the parameters that were kept."""
    adapted, losses = expand(theta, len(batch.support_x)), []
    kept = KeptParameters(0 if inner.first_order else inner.steps)
    for t in range(inner.steps):
        if not inner.first_order:
            kept.offer(t, adapted)
        adapted, support_loss = inner_step(
            group_loss, adapted, batch.support_x, batch.support_y, inner.lr
        )
        losses.append(support_loss)

    query_loss, prediction, query_gradient = loss_and_gradient(
        group_loss, adapted, batch.query_x, batch.query_y
    )
    losses.append(query_loss)
    del adapted
    by_task = walk_back(query_gradient, kept, group_loss, batch.support_x, batch.support_y, inner.lr)
    return GroupGradient(
        torch.stack(losses, dim=1), prediction, {name: g.sum(0) for name, g in by_task.items()}
    )
