"""The reference engine: learn2learn's MAML, one task after another, for any module."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError, first_line
from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.adaptation import ChunkGradient
from maml_pipeline.meta_gradient.chunk_loss import plain_predictions, single_task_loss
from maml_pipeline.meta_gradient.engine import Engine, MetaGradient
from maml_pipeline.meta_gradient.evaluation import adaptation_curves, chunk_curves, inner_steps
from maml_pipeline.meta_gradient.exactness import (
    Computation,
    LossesAndGradient,
    Workarounds,
)
from maml_pipeline.meta_gradient.inner_loop import (
    InnerLoop,
    Loss,
    Parameters,
    adapted_names,
    trainable_parameters,
)
from maml_pipeline.meta_gradient.methods import chunk_gradient
from maml_pipeline.tasks import Task, TaskBatch
from maml_pipeline.torch_internals import add_in_place

if TYPE_CHECKING:
    from learn2learn.algorithms import MAML

TaskGradient = Callable[[Task], ChunkGradient]
"""Task -> its losses `(k + 1,)`, its query prediction and its gradient, without unused parameters."""

# `build_ext` makes learn2learn's setup.py run Cython again: it ships C files that do not compile on
# Python 3.11 and later. Without dependencies, since it lists many that its import does not need.
INSTALL_COMMANDS = (
    "pip install --upgrade setuptools cython",
    "pip install --no-build-isolation --no-deps --config-settings=--build-option=build_ext "
    "learn2learn==0.2.0",
    'pip install "gym>=0.26,<0.27" scipy requests',
)
"""How to install learn2learn with plain pip; needs a C compiler. docs/install.md shows them too."""


class Learn2LearnEngine(Engine):
    """Adapt one task after another, each on learn2learn's differentiable clone of the network.

    Time: T times that of the method for one task. Memory: that of one task, independent of T, since a
    task's graph is freed before the next task adapts.

    When to use: as the reference, and for networks that `VectorizedEngine` rejects.

    Weakness: slow for small networks, whose kernels are launched for each task.

    Two cases call the network with each step's parameters instead of a clone: the methods `checkpointed`
    and `hessian_free`, since a clone keeps its graph, and networks whose layers a clone does not
    replace everywhere, such as layers that are also in a plain list.

    Raises:
        UserError: learn2learn is not installed, or cannot be imported.
    """

    def __init__(self) -> None:
        learn2learn_maml()

    def _computation(self, inner: InnerLoop) -> Computation:
        return SWEEP if _is_swept(inner) else META_GRADIENT

    def _evaluation(self) -> Computation:
        return EVALUATION

    def _meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
        metric: Loss | None,
    ) -> MetaGradient:
        is_stateless = _is_swept(inner) or workarounds.bypass_clones
        prepare = _stateless_gradient if is_stateless else _clone_gradient
        task_gradient = prepare(network, loss, inner, workarounds)
        parameters = trainable_parameters(network)
        gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
        rates = {name: torch.zeros_like(r) for name, r in (inner.rates or {}).items()}
        inner_losses: list[Tensor] = []
        metrics: list[Tensor] = []
        for task in batch.tasks():
            # A separate function, so that no graph of this task outlives the call.
            with workarounds.preserved_attributes(network):
                result = task_gradient(task)
            inner_losses.append(result.inner_losses)
            if metric is not None:
                metrics.append(metric(result.prediction, task.query_y))
            addends = result.gradient
            add_in_place([gradient[name] for name in addends], [*addends.values()])
            for name, addend in result.rates.items():
                rates[name] += addend
            del result, addends  # freed before the next task adapts

        losses_by_task = torch.stack(inner_losses)
        return MetaGradient(
            loss=losses_by_task[:, -1].mean(),
            gradient={name: total.div_(len(inner_losses)) for name, total in gradient.items()},
            inner_losses=losses_by_task,
            metric=torch.stack(metrics) if metrics else None,
            rates={name: total / len(inner_losses) for name, total in rates.items()},
        )

    def _curves(
        self,
        network: nn.Module,
        measures: dict[str, Loss],
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
        transductive: bool,
    ) -> dict[str, Tensor]:
        curves = []
        maml = differentiable_maml(network, inner)
        for task in batch.tasks():
            chunk = TaskBatch.stack([task])
            with workarounds.preserved_attributes(network):
                if workarounds.bypass_clones:
                    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
                    adapted = adapted_names(network, inner.adapt)
                    chunk_loss = single_task_loss(network, loss, workarounds, adapted)
                    predict_each = plain_predictions(network, workarounds)
                    curve = chunk_curves(
                        chunk_loss, predict_each, measures, theta, chunk, inner, transductive
                    )
                else:
                    curve = _clone_curves(maml, measures, loss, chunk, inner, workarounds, transductive)
            curves.append(curve)
        return {name: torch.cat([curve[name] for curve in curves]) for name in measures}

    def _adapted(
        self,
        network: nn.Module,
        loss: Loss,
        task: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
    ) -> Parameters:
        if workarounds.bypass_clones:
            theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
            names = adapted_names(network, inner.adapt)
            chunk_loss = single_task_loss(network, loss, workarounds, names)
            *_, adapted = inner_steps(chunk_loss, theta, task, inner)
            return {name: p[0].clone() for name, p in adapted.items()}
        maml = differentiable_maml(network, inner)
        *_, learner = _clone_steps(maml, loss, task, inner, workarounds)
        return {name: p.detach().clone() for name, p in trainable_parameters(learner.module).items()}


@cache
def learn2learn_maml() -> "type[MAML]":
    """Import learn2learn's MAML when an engine first needs it, since it is an optional dependency.

    Raises:
        UserError: It cannot be imported.
    """
    with suppress(ImportError):
        import gym_notices.notices

        # learn2learn imports gym, which prints a deprecation notice that users of this package cannot
        # act on. Clearing its text keeps all other warnings.
        gym_notices.notices.notices.clear()
    try:
        from learn2learn.algorithms import MAML
    except Exception as error:  # one of its dependencies may be missing, or of a version that fails
        raise UserError(
            f"engine learn2learn needs learn2learn, which cannot be imported ({first_line(error)}); "
            f"set engine to vectorized, or install it with:\n{' && '.join(INSTALL_COMMANDS)}"
        ) from error

    maml: type[MAML] = MAML
    return maml


def _is_swept(inner: InnerLoop) -> bool:
    """Tell whether a reverse sweep computes the meta-gradient."""
    return not inner.is_first_order and inner.method is not Method.UNROLLED


def differentiable_maml(network: nn.Module, inner: InnerLoop) -> "MAML":
    """Wrap a network in learn2learn's MAML, whose clones adapt to one task each."""
    # Frozen and unused parameters are allowed and left unchanged.
    return learn2learn_maml()(
        network, lr=inner.lr, first_order=inner.is_first_order, allow_unused=True, allow_nograd=True
    )


def adapt_clone(learner: "MAML", support_loss: Tensor, inner: InnerLoop, t: int) -> None:
    """Take inner step t; learn2learn's own `adapt` moves every parameter by the same rate."""
    is_differentiated = t >= inner.first_differentiated_step
    if inner.adapt is None and inner.rates is None:
        learner.adapt(support_loss, first_order=not is_differentiated)
        return
    from learn2learn.utils import update_module

    module = learner.module
    parameters = dict(module.named_parameters())
    names = adapted_names(module, inner.adapt)  # a clone's parameters keep their names
    gradients = torch.autograd.grad(
        support_loss,
        [parameters[name] for name in names],
        retain_graph=is_differentiated,
        create_graph=is_differentiated,
        allow_unused=True,
    )
    update = {
        name: -inner.rate(t, name) * g for name, g in zip(names, gradients, strict=True) if g is not None
    }
    learner.module = update_module(module, updates=[update.get(name) for name in parameters])


def _clone_gradient(
    network: nn.Module, loss: Loss, inner: InnerLoop, workarounds: Workarounds
) -> TaskGradient:
    """Differentiate each task's query loss through a clone of learn2learn's MAML."""
    maml, parameters = differentiable_maml(network, inner), trainable_parameters(network)
    inner = inner.with_differentiable_rates()
    rates = inner.rates or {}

    def task_gradient(task: Task) -> ChunkGradient:
        learner = maml.clone()
        losses: list[Tensor] = []
        for t in range(inner.steps):
            support_loss, _ = workarounds.evaluate(learner, loss, task.support_x, task.support_y)
            adapt_clone(learner, support_loss, inner, t)
            losses.append(support_loss.detach())

        query_loss, prediction = workarounds.evaluate(learner, loss, task.query_x, task.query_y)
        losses.append(query_loss.detach())
        leaves = [*parameters.values(), *rates.values()]
        gradients = iter(torch.autograd.grad(query_loss, leaves, allow_unused=True))
        gradient, of_rates = (
            {name: g for name, g in zip(names, gradients, strict=False) if g is not None}
            for names in (parameters, rates)
        )
        return ChunkGradient(torch.stack(losses), prediction.detach(), gradient, of_rates)

    return task_gradient


def _stateless_gradient(
    network: nn.Module, loss: Loss, inner: InnerLoop, workarounds: Workarounds
) -> TaskGradient:
    """Compute the same as `_clone_gradient`, as a chunk of one task without a clone."""
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    adapted = adapted_names(network, inner.adapt)
    chunk_loss = single_task_loss(network, loss, workarounds, adapted)

    def task_gradient(task: Task) -> ChunkGradient:
        result = chunk_gradient(chunk_loss, theta, TaskBatch.stack([task]), inner)
        return result._replace(inner_losses=result.inner_losses[0], prediction=result.prediction[0])

    return task_gradient


def _clone_curves(
    maml: "MAML",
    measures: dict[str, Loss],
    loss: Loss,
    chunk: TaskBatch,
    inner: InnerLoop,
    workarounds: Workarounds,
    transductive: bool,
) -> dict[str, Tensor]:
    def predict(learner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return workarounds.predict(learner, x[0])[None]

    states = _clone_steps(maml, loss, chunk, inner, workarounds)
    return adaptation_curves(states, predict, predict, measures, chunk, inner.steps, transductive)


def _clone_steps(
    maml: "MAML", loss: Loss, chunk: TaskBatch, inner: InnerLoop, workarounds: Workarounds
) -> "Iterator[MAML]":
    """Yield a clone before the first inner step on a chunk of one task, and after each step."""
    learner = maml.clone()
    yield learner
    for t in range(inner.steps):
        support_loss, _ = workarounds.evaluate(learner, loss, chunk.support_x[0], chunk.support_y[0])
        adapt_clone(learner, support_loss, inner, t)
        yield learner


def _losses_and_gradient(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, workarounds: Workarounds
) -> LossesAndGradient:
    engine = Learn2LearnEngine()
    result = engine._meta_gradient(network, loss, batch, inner, workarounds, metric=None)
    return LossesAndGradient(result.inner_losses, result.gradient, result.rates)


def _query_losses(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, workarounds: Workarounds
) -> LossesAndGradient:
    engine = Learn2LearnEngine()
    curves = engine._curves(network, {"loss": loss}, loss, batch, inner, workarounds, transductive=True)
    return LossesAndGradient(curves["loss"], {}, {})


META_GRADIENT = Computation(
    engine="learn2learn",
    compute=_losses_and_gradient,
    is_evaluation=False,
    uses_vmap=False,
    uses_clones=True,
    error_remedy="write it with other operations",
    random_remedy=None,
    remedy="read parameters from the attributes that hold them (or from nn.ParameterDict)",
)
SWEEP = META_GRADIENT._replace(
    uses_clones=False,
    error_remedy="set method to unrolled",
    random_remedy="set method to unrolled",
)
EVALUATION = META_GRADIENT._replace(compute=_query_losses, is_evaluation=True)
