"""One meta-gradient of a group of tasks, written for all of them together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import (
    GroupLoss,
    expand,
    gradient,
    inner_step,
    loss_and_gradient,
)
from maml_pipeline.meta_gradient.checkpointed import KeptParameters, hessian_vector_product, walk_back
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.tasks import TaskBatch


class GroupGradient(NamedTuple):
    """A group's losses `(G, k + 1)`, query predictions `(G, Q, ...)` and summed meta-gradient."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function as it is; what compiles it first has the same signature."""
    return function(*arguments)


def group_gradient(
    group_loss: GroupLoss,
    theta: Parameters,
    batch: TaskBatch,
    inner: InnerLoop,
    run: Callable[..., Any] = directly,
) -> GroupGradient:
    """Compute the sum over G tasks of the gradient of the query loss after adaptation.

    Args:
        group_loss: The losses of all tasks at once.
        theta: Initial parameters, which all tasks share.
        batch: G tasks.
        inner: How to adapt, and the gradient order.
        run: Calls each piece that is a pure function of tensors, such as `directly`.
    """
    if inner.first_order or inner.checkpointed:
        return _with_kept_parameters(group_loss, theta, batch, inner, run)
    return GroupGradient(*run(_unrolled, group_loss, theta, batch, inner))


def _unrolled(
    group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor, Parameters]:
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
    return torch.stack(losses, dim=1), prediction.detach(), gradient(query_loss, theta)


def _with_kept_parameters(
    group_loss: GroupLoss,
    theta: Parameters,
    batch: TaskBatch,
    inner: InnerLoop,
    run: Callable[..., Any],
) -> GroupGradient:
    """Adapt without a graph; second order then walks back over the parameters that were kept."""
    support = batch.support_x, batch.support_y

    def step(theta_t: Parameters) -> tuple[Parameters, Tensor]:
        stepped: tuple[Parameters, Tensor] = run(inner_step, group_loss, theta_t, *support, inner.lr)
        return stepped

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        multiplied: Parameters = run(hessian_vector_product, group_loss, theta_t, *support, vector)
        return multiplied

    adapted, losses = expand(theta, len(batch.support_x)), []
    kept = KeptParameters(0 if inner.first_order else inner.steps)
    for t in range(inner.steps):
        if not inner.first_order:
            kept.offer(t, adapted)
        adapted, support_loss = step(adapted)
        losses.append(support_loss)

    query_loss, prediction, by_task = run(
        loss_and_gradient, group_loss, adapted, batch.query_x, batch.query_y
    )
    losses.append(query_loss)
    del adapted
    by_task = walk_back(by_task, kept, lambda theta_t: step(theta_t)[0], product, inner.lr)
    return GroupGradient(
        torch.stack(losses, dim=1), prediction, {name: g.sum(0) for name, g in by_task.items()}
    )
