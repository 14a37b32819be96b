"""The reference engine: learn2learn's MAML, one task after another, for any module."""

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.adaptation import GroupLoss
from maml_pipeline.meta_gradient.by_hand import Expected
from maml_pipeline.meta_gradient.exactness import evaluating, verified_handling
from maml_pipeline.meta_gradient.handling import Handling, without_fast_path
from maml_pipeline.meta_gradient.inner_loop import (
    Engine,
    InnerLoop,
    Loss,
    MetaGradient,
    Parameters,
    first_order,
    trainable_parameters,
)
from maml_pipeline.meta_gradient.query_prediction import predict_query
from maml_pipeline.meta_gradient.stateless import stateless
from maml_pipeline.meta_gradient.task_group import group_gradient
from maml_pipeline.meta_gradient.trial import Way
from maml_pipeline.meta_gradient.vectorized_engine import curves_of_group
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
    call the same module with each step's parameters instead. So do networks that a clone does not see
    through, such as those that keep their layers in a plain list as well.
    """

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
            UserError: The network has no exact meta-gradient here, and why.
        """
        handling = _handling(network, loss, batch, inner)
        return _meta_gradient(network, loss, batch, inner, handling, metric)

    def check(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        """See `Engine.check`."""
        _handling(network, loss, batch, inner)

    def check_evaluation(
        self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
    ) -> None:
        """See `Engine.check_evaluation`."""
        with evaluating(network):
            verified_handling(EVALUATIONS, network, loss, batch, first_order(inner))

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
        steps = first_order(inner)
        with torch.inference_mode(False), torch.enable_grad(), without_fast_path():
            # Tensors made under inference mode cannot be saved for a backward pass; their clones can.
            batch = TaskBatch(*(tensor.clone() for tensor in batch))
            handling = verified_handling(EVALUATIONS, network, loss, batch, steps)
            return _adaptation_curves(network, measures, loss, batch, steps, handling, transductive)


def _handling(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> Handling:
    way = CHECKPOINTED if inner.checkpointed and not inner.first_order else UNROLLED
    return verified_handling(way, network, loss, batch, inner)


def _meta_gradient(
    network: nn.Module,
    loss: Loss,
    batch: TaskBatch,
    inner: InnerLoop,
    handling: Handling,
    metric: Loss | None = None,
) -> MetaGradient:
    is_checkpointed = inner.checkpointed and not inner.first_order
    task_gradient = _stateless_gradient if is_checkpointed or handling.calls_network else _clone_gradient
    parameters = trainable_parameters(network)
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    inner_losses: list[Tensor] = []
    metrics: list[Tensor] = []
    for task in batch.tasks():
        # A function of its own, so that nothing of this task's graph outlives it.
        with handling.restored(network):
            losses, prediction, addends = task_gradient(network, loss, task, inner, handling)
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


def _adaptation_curves(
    network: nn.Module,
    measures: dict[str, Loss],
    loss: Loss,
    batch: TaskBatch,
    inner: InnerLoop,
    handling: Handling,
    transductive: bool = True,
) -> dict[str, Tensor]:
    task_curves = _stateless_curves if handling.calls_network else _clone_curves
    by_task = []
    for task in batch.tasks():
        with handling.restored(network):
            by_task.append(task_curves(network, measures, loss, task, inner, handling, transductive))
    return {name: torch.stack([curves[name] for curves in by_task]) for name in measures}


def _clone_gradient(
    network: nn.Module, loss: Loss, task: Task, inner: InnerLoop, handling: Handling
) -> tuple[Tensor, Tensor, Parameters]:
    """Return one task's losses `(k + 1,)`, its query prediction and its gradient."""
    learner = clone_for_task(network, inner)
    losses: list[Tensor] = []
    for _ in range(inner.steps):
        support_loss, _ = handling.evaluate(learner, loss, task.support_x, task.support_y)
        learner.adapt(support_loss)
        losses.append(support_loss.detach())

    query_loss, prediction = handling.evaluate(learner, loss, task.query_x, task.query_y)
    losses.append(query_loss.detach())
    parameters = trainable_parameters(network)
    gradients = torch.autograd.grad(query_loss, list(parameters.values()), allow_unused=True)
    gradient = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return torch.stack(losses), prediction.detach(), gradient


def _clone_curves(
    network: nn.Module,
    measures: dict[str, Loss],
    loss: Loss,
    task: Task,
    inner: InnerLoop,
    handling: Handling,
    transductive: bool,
) -> dict[str, Tensor]:
    learner = clone_for_task(network, inner)
    curves: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step in range(inner.steps + 1):
        with torch.no_grad():
            predict = partial(handling.predict, learner)
            prediction = predict_query(lambda x, _: predict(x), task, transductive)  # noqa: B023
            for name, measure in measures.items():
                curves[name].append(measure(prediction, task.query_y))
        if step < inner.steps:
            support_loss, _ = handling.evaluate(learner, loss, task.support_x, task.support_y)
            learner.adapt(support_loss)
    return {name: torch.stack(values) for name, values in curves.items()}


def _stateless_gradient(
    network: nn.Module, loss: Loss, task: Task, inner: InnerLoop, handling: Handling
) -> tuple[Tensor, Tensor, Parameters]:
    """Compute the same as `_clone_gradient`, as a group of one task."""
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    group_loss = _loss_of_one(network, loss, handling)
    result = group_gradient(group_loss, theta, TaskBatch.stack([task]), inner)
    return result.inner_losses[0], result.prediction[0], result.gradient


def _stateless_curves(
    network: nn.Module,
    measures: dict[str, Loss],
    loss: Loss,
    task: Task,
    inner: InnerLoop,
    handling: Handling,
    transductive: bool,
) -> dict[str, Tensor]:
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    group_loss = _loss_of_one(network, loss, handling)
    one = TaskBatch.stack([task])
    curves = curves_of_group(group_loss, measures, theta, one, inner, transductive)
    return {name: curve[0] for name, curve in curves.items()}


def _loss_of_one(network: nn.Module, loss: Loss, handling: Handling) -> GroupLoss:
    call = stateless(network)

    def group_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = {name: p[0] for name, p in parameters.items()}
        value, prediction = handling.evaluate(partial(call, own), loss, x[0], y[0])
        return value[None], prediction[None]

    return group_loss


def _as_expected(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, handling: Handling
) -> Expected:
    result = _meta_gradient(network, loss, batch, inner, handling)
    return Expected(result.inner_losses, result.gradient)


def _query_losses(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, handling: Handling
) -> Expected:
    return Expected(
        _adaptation_curves(network, {"loss": loss}, loss, batch, inner, handling)["loss"], {}
    )


UNROLLED = Way(
    engine="learn2learn",
    compute=_as_expected,
    evaluates=False,
    maps_tasks=False,
    clones=True,
    error_remedy="write it with other operations",
    random_remedy=None,
    remedy="read parameters from the attributes that hold them (or from nn.ParameterDict)",
)
UNCHECKPOINTED = "set checkpoint_inner_steps to false"
CHECKPOINTED = UNROLLED._replace(clones=False, error_remedy=UNCHECKPOINTED, random_remedy=UNCHECKPOINTED)
EVALUATIONS = UNROLLED._replace(compute=_query_losses, evaluates=True)
