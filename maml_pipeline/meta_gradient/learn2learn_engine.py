"""The reference engine: learn2learn's MAML, one task after another, for any module."""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.inner_loop import (
    Engine,
    InnerLoop,
    Loss,
    MetaGradient,
    Parameters,
    trainable_parameters,
)
from maml_pipeline.meta_gradient.query_prediction import predict_query
from maml_pipeline.meta_gradient.stateless import stateless
from maml_pipeline.meta_gradient.task_group import group_gradient
from maml_pipeline.meta_gradient.vectorizable import check_repeatable, check_twice_differentiable
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


class Learn2LearnEngine(Engine):
    """Adapt one task after another, each on a clone that learn2learn makes of the network.

    A task's graph is freed before the next task adapts: memory does not grow with their number.
    Checkpointed inner steps cannot go through learn2learn, whose clones hold on to their graph; they
    call the same module with each step's parameters instead.
    """

    def __init__(self) -> None:
        self._repeatable: set[nn.Module] = set()

    def meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        metric: Loss | None = None,
    ) -> MetaGradient:
        """See `Engine.meta_gradient`.

        Raises:
            UserError: Inner steps are checkpointed, and the network would not repeat them exactly.
        """
        check_twice_differentiable(network, inner)
        task_gradient = _unrolled_gradient
        if inner.checkpointed and not inner.first_order:
            if network not in self._repeatable:
                check_repeatable(network, batch, remedy="set checkpoint_inner_steps to false")
                self._repeatable.add(network)
            task_gradient = _checkpointed_gradient

        parameters = trainable_parameters(network)
        gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
        inner_losses: list[Tensor] = []
        metrics: list[Tensor] = []
        for task in batch.tasks():
            # A function of its own, so that nothing of this task's graph outlives it.
            losses, prediction, addends = task_gradient(network, loss, task, inner)
            inner_losses.append(losses)
            if metric is not None:
                metrics.append(metric(prediction, task.query_y))
            for name, addend in addends.items():
                gradient[name] += addend

        losses_by_task = torch.stack(inner_losses)
        return MetaGradient(
            loss=losses_by_task[:, -1].mean(),
            gradient={name: total.div_(len(inner_losses)) for name, total in gradient.items()},
            inner_losses=losses_by_task,
            metric=torch.stack(metrics) if metrics else None,
        )

    def adaptation_curves(
        self,
        network: nn.Module,
        measures: dict[str, Loss],
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        transductive: bool = True,
    ) -> dict[str, Tensor]:
        """See `Engine.adaptation_curves`."""
        steps = InnerLoop(inner.lr, inner.steps, first_order=True)
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors made under inference mode cannot be saved for a backward pass; their clones can.
            batch = TaskBatch(*(tensor.clone() for tensor in batch))
            by_task = [
                _curves(network, measures, loss, task, steps, transductive) for task in batch.tasks()
            ]
        return {name: torch.stack([curves[name] for curves in by_task]) for name in measures}


def _unrolled_gradient(
    network: nn.Module, loss: Loss, task: Task, inner: InnerLoop
) -> tuple[Tensor, Tensor, Parameters]:
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
    parameters = trainable_parameters(network)
    gradients = torch.autograd.grad(query_loss, list(parameters.values()), allow_unused=True)
    gradient = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return torch.stack(losses), prediction.detach(), gradient


def _checkpointed_gradient(
    network: nn.Module, loss: Loss, task: Task, inner: InnerLoop
) -> tuple[Tensor, Tensor, Parameters]:
    """Compute the same as `_unrolled_gradient`, as a group of one task."""
    call = stateless(network)

    def group_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        prediction = call({name: p[0] for name, p in parameters.items()}, x[0])
        return loss(prediction, y[0])[None], prediction[None]

    result = group_gradient(group_loss, trainable_parameters(network), TaskBatch.stack([task]), inner)
    return result.inner_losses[0], result.prediction[0], result.gradient


def _curves(
    network: nn.Module,
    measures: dict[str, Loss],
    loss: Loss,
    task: Task,
    inner: InnerLoop,
    transductive: bool,
) -> dict[str, Tensor]:
    learner = clone_for_task(network, inner)
    curves: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step in range(inner.steps + 1):
        with torch.no_grad():
            prediction = predict_query(lambda x, _: learner(x), task, transductive)
            for name, measure in measures.items():
                curves[name].append(measure(prediction, task.query_y))
        if step < inner.steps:
            learner.adapt(loss(learner(task.support_x), task.support_y))
    return {name: torch.stack(values) for name, values in curves.items()}
