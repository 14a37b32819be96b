"""The reference engine: learn2learn's MAML, one task after another, for any module."""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.inner_loop import (
    InnerLoop,
    Loss,
    MetaGradient,
    trainable_parameters,
)
from maml_pipeline.tasks import Task, TaskBatch

if TYPE_CHECKING:
    from learn2learn.algorithms import MAML


@cache
def learn2learn_maml() -> "type[MAML]":
    """Import learn2learn's MAML; late, since it takes seconds that a mistyped config should not."""
    import gym_notices.notices

    # learn2learn imports gym, which prints a banner that no user of this package can act on. Taking
    # away its text keeps every real warning.
    gym_notices.notices.notices.clear()
    from learn2learn.algorithms import MAML

    maml: type[MAML] = MAML
    return maml


def clone_for_task(network: nn.Module, inner: InnerLoop) -> "MAML":
    """Return learn2learn's differentiable copy of the network, ready to adapt to one task."""
    # Frozen and unused parameters are a person's right: they are left as they are.
    return learn2learn_maml()(
        network, lr=inner.lr, first_order=inner.first_order, allow_unused=True, allow_nograd=True
    ).clone()


def meta_gradient(
    network: nn.Module,
    loss: Loss,
    batch: TaskBatch,
    inner: InnerLoop,
    metric: Loss | None = None,
) -> MetaGradient:
    """Compute the gradient of the mean query loss after adaptation, task by task.

    Each task is differentiated, and its graph freed, before the next one is adapted: memory does
    not grow with the number of tasks. Nothing is left in `.grad`.

    Args:
        network: Any module, its initial parameters theta.
        loss: (prediction, target) -> scalar, for support and query set alike.
        batch: T tasks.
        inner: How to adapt, and the gradient order.
        metric: (prediction, target) -> scalar, judged on the query set.

    Returns:
        The meta-gradient, detached.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1 and algorithm 1; first order: section 5.2.
    """
    parameters = trainable_parameters(network)
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    inner_losses: list[Tensor] = []
    metrics: list[Tensor] = []

    for task in batch.tasks():
        # A function of its own, so that nothing of this task's graph outlives it.
        losses, prediction, addends = _task_gradient(network, loss, task, inner)
        inner_losses.append(losses)
        if metric is not None:
            metrics.append(metric(prediction, task.query_y))
        for total, addend in zip(gradient.values(), addends, strict=True):
            if addend is not None:
                total += addend

    losses_by_task = torch.stack(inner_losses)
    return MetaGradient(
        loss=losses_by_task[:, -1].mean(),
        gradient={name: total.div_(len(inner_losses)) for name, total in gradient.items()},
        inner_losses=losses_by_task,
        metric=torch.stack(metrics) if metrics else None,
    )


def _task_gradient(
    network: nn.Module, loss: Loss, task: Task, inner: InnerLoop
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Return one task's losses `(k + 1,)`, its query prediction and its gradient."""
    learner = clone_for_task(network, inner)
    losses: list[Tensor] = []
    for _ in range(inner.steps):
        support_loss = loss(learner(task.support_x), task.support_y)
        learner.adapt(support_loss)
        losses.append(support_loss.detach())

    prediction = learner(task.query_x)
    query_loss = loss(prediction, task.query_y)
    losses.append(query_loss.detach())
    parameters = list(trainable_parameters(network).values())
    gradient = torch.autograd.grad(query_loss, parameters, allow_unused=True)
    return torch.stack(losses), prediction.detach(), gradient
