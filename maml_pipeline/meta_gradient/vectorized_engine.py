"""The fast engine: all tasks of a chunk at once."""

from collections.abc import Hashable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import vmap

from maml_pipeline.meta_gradient.adaptation import GroupLoss, expand, inner_step
from maml_pipeline.meta_gradient.by_hand import Expected
from maml_pipeline.meta_gradient.chunks import fitting_chunk
from maml_pipeline.meta_gradient.compilation import CompiledCalls
from maml_pipeline.meta_gradient.exactness import evaluating, verified_handling
from maml_pipeline.meta_gradient.handling import Handling, without_fast_path
from maml_pipeline.meta_gradient.identity import Identity
from maml_pipeline.meta_gradient.inner_loop import (
    Engine,
    InnerLoop,
    Loss,
    MetaGradient,
    Parameters,
    first_order,
    trainable_parameters,
)
from maml_pipeline.meta_gradient.memory import available_bytes, peak_bytes
from maml_pipeline.meta_gradient.query_prediction import predict_query
from maml_pipeline.meta_gradient.stateless import stateless
from maml_pipeline.meta_gradient.task_group import GroupGradient, directly, group_gradient
from maml_pipeline.meta_gradient.trial import Way
from maml_pipeline.tasks import TaskBatch
from maml_pipeline.tasks.task import check_at_least

SHARE_OF_MEMORY = 0.8
REMEDY = "use engine learn2learn"


class VectorizedEngine(Engine):
    """Adapt T tasks at once: the network's forward pass is mapped over tasks by `torch.func.vmap`.

    vmap alone comes from functorch; every derivative is autograd's. (Under functorch's own `grad`,
    PyTorch's native batch normalisation has a wrong second derivative.)

    Args:
        tasks_per_chunk: Tasks that are adapted at once, which bounds memory; `None` for all of them,
            `"auto"` for as many as fit into 80 % of the memory that is free when the first
            meta-gradient is computed. The result does not depend on it.
        compile: Compile the whole meta-gradient with `torch.compile`; see `CompiledCalls`.

    Raises:
        UserError: `tasks_per_chunk` is below 1.
    """

    def __init__(
        self, tasks_per_chunk: int | Literal["auto"] | None = None, compile: bool = False
    ) -> None:
        if isinstance(tasks_per_chunk, int):
            check_at_least("tasks_per_chunk", tasks_per_chunk, 1)
        self.tasks_per_chunk = tasks_per_chunk
        self.compile = compile
        self._run = CompiledCalls() if compile else directly
        self._chosen: dict[Hashable, int] = {}
        self._group_losses: dict[Hashable, tuple[GroupLoss, list[Tensor]]] = {}

    def __reduce__(self) -> tuple[type["VectorizedEngine"], tuple[object, ...]]:
        """Copy and pickle the settings alone: what is cached belongs to the network at hand."""
        return VectorizedEngine, (self.tasks_per_chunk, self.compile)

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
            UserError: The network cannot be mapped over tasks exactly, and why.
        """
        handling = verified_handling(META_GRADIENTS, network, loss, batch, inner)
        group_loss = self._group_loss(network, loss, handling)
        theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
        with handling.restored(network):
            results = [
                group_gradient(group_loss, theta, chunk, inner, self._run)
                for chunk in self._chunks(group_loss, theta, batch, inner)
            ]
        inner_losses = torch.cat([result.inner_losses for result in results])
        prediction = torch.cat([result.prediction for result in results])
        return MetaGradient(
            loss=inner_losses[:, -1].mean(),
            gradient=_mean(results, tasks=len(inner_losses)),
            inner_losses=inner_losses,
            metric=None if metric is None else task_by_task(metric, prediction, batch.query_y),
        )

    def check(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        """See `Engine.check`."""
        verified_handling(META_GRADIENTS, network, loss, batch, inner)

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
        with torch.inference_mode(False), torch.enable_grad(), without_fast_path():
            # Tensors made under inference mode cannot be saved for a backward pass; their clones can.
            batch = TaskBatch(*(tensor.clone() for tensor in batch))
            steps = first_order(inner)
            handling = verified_handling(EVALUATIONS, network, loss, batch, steps)
            group_loss = self._group_loss(network, loss, handling)
            theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
            with handling.restored(network):
                chunks = [
                    curves_of_group(group_loss, measures, theta, chunk, inner, transductive)
                    for chunk in self._chunks(group_loss, theta, batch, steps)
                ]
        return {name: torch.cat([curves[name] for curves in chunks]) for name in measures}

    def _group_loss(self, network: nn.Module, loss: Loss, handling: Handling) -> GroupLoss:
        """Return the loss of many tasks at once: always the same one, for the sake of compiling."""
        trainable = trainable_parameters(network)
        # What is replaced by another object, or frozen, or no longer so, asks for another function.
        constants = [p for p in network.parameters() if not p.requires_grad] + [*network.buffers()]
        if isinstance(loss, nn.Module):
            constants += [*loss.parameters(), *loss.buffers()]
        key = network, network.training, Identity(loss), handling, *trainable, *map(id, constants)
        if key not in self._group_losses:
            self._group_losses[key] = mapped_loss(network, loss, handling), constants
        return self._group_losses[key][0]

    def _chunks(
        self, group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
    ) -> Iterator[TaskBatch]:
        tasks = len(batch.support_x)
        size = self.tasks_per_chunk or tasks
        if size == "auto":
            key = group_loss, inner, *(tensor.shape for tensor in batch)
            if key not in self._chosen:
                self._chosen[key] = _fitting_chunk(group_loss, theta, batch, inner)
            size = self._chosen[key]
        for start in range(0, tasks, size):
            yield _slice(batch, start, size)


def mapped_loss(network: nn.Module, loss: Loss, handling: Handling) -> GroupLoss:
    """Map a network and its loss over tasks, each with parameters of its own."""
    call = stateless(network)

    def task_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return handling.evaluate(partial(call, parameters), loss, x, y)

    group_loss: GroupLoss = vmap(task_loss)
    return group_loss


def _meta_gradient(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, handling: Handling
) -> Expected:
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    with handling.restored(network):
        result = group_gradient(mapped_loss(network, loss, handling), theta, batch, inner)
    return Expected(result.inner_losses, _mean([result], tasks=len(batch.support_x)))


def _query_losses(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, handling: Handling
) -> Expected:
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    group_loss = mapped_loss(network, loss, handling)
    with handling.restored(network):
        curves = curves_of_group(group_loss, {"loss": loss}, theta, batch, inner)
    return Expected(curves["loss"], {})


META_GRADIENTS = Way(
    engine="vectorized",
    compute=_meta_gradient,
    evaluates=False,
    maps_tasks=True,
    clones=False,
    error_remedy=REMEDY,
    random_remedy=REMEDY,
    remedy="read parameters from the attributes that hold them, or use engine learn2learn",
)
EVALUATIONS = META_GRADIENTS._replace(compute=_query_losses, evaluates=True)


def _fitting_chunk(group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop) -> int:
    device = batch.support_x.device

    def measure(tasks: int) -> int:
        some = _slice(batch, 0, tasks)
        group_gradient(group_loss, theta, some, inner)  # a first call fills caches
        return peak_bytes(lambda: group_gradient(group_loss, theta, some, inner), device)

    available = int(SHARE_OF_MEMORY * available_bytes(device))
    return fitting_chunk(measure, len(batch.support_x), available)


def _slice(batch: TaskBatch, start: int, tasks: int) -> TaskBatch:
    return TaskBatch(*(tensor[start : start + tasks] for tensor in batch))


def task_by_task(measure: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """Measure each task by itself, since a measure may be any function: -> `(T,)`."""
    pairs = zip(prediction, target, strict=True)
    return torch.stack([measure(task_prediction, y) for task_prediction, y in pairs])


def _mean(results: list[GroupGradient], tasks: int) -> Parameters:
    total = results[0].gradient
    for result in results[1:]:
        total = {name: g + result.gradient[name] for name, g in total.items()}
    return {name: g / tasks for name, g in total.items()}


def _predict(group_loss: GroupLoss, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
    return group_loss(parameters, x, y)[1]


def curves_of_group(
    group_loss: GroupLoss,
    measures: dict[str, Loss],
    theta: Parameters,
    batch: TaskBatch,
    inner: InnerLoop,
    transductive: bool = True,
) -> dict[str, Tensor]:
    """Measure every task's query set before the first inner step and after every one: `(G, k + 1)`."""
    adapted = expand(theta, len(batch.support_x))
    curves: dict[str, list[Tensor]] = {name: [] for name in measures}
    for t in range(inner.steps + 1):
        with torch.no_grad():
            predict = partial(_predict, group_loss, adapted)
            prediction = predict_query(predict, batch, transductive)
            for name, measure in measures.items():
                curves[name].append(task_by_task(measure, prediction, batch.query_y))
        if t < inner.steps:
            adapted, _ = inner_step(group_loss, adapted, batch.support_x, batch.support_y, inner.lr)
    return {name: torch.stack(values, dim=1) for name, values in curves.items()}
