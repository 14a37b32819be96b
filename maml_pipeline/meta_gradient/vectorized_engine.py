"""The fast engine: all tasks of a chunk adapt at once, under `torch.func.vmap`."""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from maml_pipeline.limits import check_at_least
from maml_pipeline.meta_gradient.adaptation import ChunkGradient
from maml_pipeline.meta_gradient.captured import (
    CapturedCalls,
    CudaGraphs,
    plain_tensors,
    python_state,
)
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss, plain_predictions, vectorized_loss
from maml_pipeline.meta_gradient.chunk_size import measured_chunk_size
from maml_pipeline.meta_gradient.engine import Engine, MetaGradient
from maml_pipeline.meta_gradient.evaluation import chunk_curves, inner_steps, measure_each_task
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
from maml_pipeline.tasks import TaskBatch


class VectorizedEngine(Engine):
    """Adapt the tasks of a chunk at once: `torch.func.vmap` maps the network over tasks.

    Time: the kernel launches of one task per chunk, and the arithmetic of T tasks. Memory: that of the
    method times the number of tasks per chunk.

    When to use: whenever it accepts the network. The gain is largest for small networks, where launching
    a kernel takes longer than running it, and for GPUs.

    On a GPU, the third meta-gradient in a row with the same settings and shapes is captured as a CUDA
    graph, and later ones replay it (captured.py): one launch for all tasks, chunks and inner steps. The
    memory of a meta-gradient then stays reserved.

    Weakness: rejects what vmap does not support, such as random numbers, control flow that depends on
    data and recurrent layers.

    Also known as batched or vmapped MAML. Only vmap comes from functorch; all derivatives are
    autograd's, since PyTorch's native batch normalisation has a wrong second derivative under
    functorch's `grad`.

    Args:
        tasks_per_chunk: Number of tasks that adapt at once; memory is proportional to it. `None` for
            all tasks, `"auto"` for as many as fit into 80 % of the memory that is free at the first
            meta-gradient. The result does not depend on it. An evaluation takes at least two.

    Raises:
        UserError: `tasks_per_chunk` is below 1.
    """

    def __init__(self, tasks_per_chunk: int | Literal["auto"] | None = None) -> None:
        if isinstance(tasks_per_chunk, int):
            check_at_least("tasks_per_chunk", tasks_per_chunk, 1)
        self.tasks_per_chunk = tasks_per_chunk
        self._auto_chunks: dict[Hashable, int] = {}
        self._chunk_losses: dict[Hashable, tuple[ChunkLoss, list[Tensor]]] = {}
        self.captured_calls = CapturedCalls(CudaGraphs())

    def __reduce__(self) -> tuple[type["VectorizedEngine"], tuple[object, ...]]:
        """Copy and pickle the settings only: the caches belong to the current network."""
        return VectorizedEngine, (self.tasks_per_chunk,)

    def forget_captures(self) -> None:
        """See `Engine.forget_captures`."""
        self.captured_calls.forget()

    def _computation(self, inner: InnerLoop) -> Computation:
        return META_GRADIENT

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
        chunk_loss, constants = self._chunk_loss(network, loss, workarounds, inner)
        theta = {name: p.detach() for name, p in trainable_parameters(network).items()}

        def compute(
            batch: TaskBatch, live: tuple[Parameters, Parameters, list[Tensor]]
        ) -> ChunkGradient:
            theta, rates, _ = live
            with_rates = replace(inner, rates=rates) if rates else inner
            with workarounds.preserved_attributes(network):
                return mean_of_chunks(
                    [
                        chunk_gradient(chunk_loss, theta, chunk, with_rates)
                        for chunk in self._chunks(chunk_loss, theta, batch, inner)
                    ]
                )

        rates = dict(inner.rates or {})
        if batch.support_x.device.type == self.captured_calls.device:
            key = chunk_loss, inner, self.tasks_per_chunk, python_state(network), python_state(loss)
            kept = [*constants, *plain_tensors(network), *plain_tensors(loss)]
            result = self.captured_calls(key, compute, batch, (theta, rates, kept))
        else:
            result = compute(batch, (theta, rates, constants))
        return to_meta_gradient(result, batch, metric)

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
        chunk_loss, _ = self._chunk_loss(network, loss, workarounds, inner, is_evaluation=True)
        theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
        predict_each = plain_predictions(network, workarounds)
        chunks: list[dict[str, Tensor]] = []
        with workarounds.preserved_attributes(network):
            for chunk in self._chunks(chunk_loss, theta, batch, inner):
                curves = self.captured_calls.with_memory(
                    partial(
                        chunk_curves,
                        *(chunk_loss, predict_each, measures, theta),
                        *(at_least_two_tasks(chunk), inner, transductive),
                    )
                )
                tasks = len(chunk.support_x)
                chunks.append({name: curve[:tasks] for name, curve in curves.items()})
        return {name: torch.cat([curves[name] for curves in chunks]) for name in measures}

    def _adapted(
        self,
        network: nn.Module,
        loss: Loss,
        task: TaskBatch,
        inner: InnerLoop,
        workarounds: Workarounds,
    ) -> Parameters:
        chunk_loss, _ = self._chunk_loss(network, loss, workarounds, inner, is_evaluation=True)
        theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
        *_, adapted = inner_steps(chunk_loss, theta, at_least_two_tasks(task), inner)
        return {name: p[0].clone() for name, p in adapted.items()}

    def _chunk_loss(
        self,
        network: nn.Module,
        loss: Loss,
        workarounds: Workarounds,
        inner: InnerLoop,
        is_evaluation: bool = False,
    ) -> tuple[ChunkLoss, list[Tensor]]:
        """Return the loss of a chunk, the same function each time for the same network and loss, and the
        tensors besides parameters that it depends on.
        """
        trainable = trainable_parameters(network)
        # A tensor that is replaced, frozen or unfrozen requires a new function.
        constants = [p for p in network.parameters() if not p.requires_grad] + [*network.buffers()]
        if isinstance(loss, nn.Module):
            constants += [*loss.parameters(), *loss.buffers()]
        # The values keep the loss and the constants alive, so that no id is reused.
        key = (
            *(network, network.training, id(loss), workarounds, inner.adapt, is_evaluation),
            *(*trainable, *map(id, constants)),
        )
        if key not in self._chunk_losses:
            build = _evaluation_loss if is_evaluation else _training_loss
            self._chunk_losses[key] = build(network, loss, workarounds, inner), constants
        return self._chunk_losses[key]

    def _chunks(
        self, chunk_loss: ChunkLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
    ) -> Iterator[TaskBatch]:
        tasks = len(batch.support_x)
        size = self.tasks_per_chunk or tasks
        if size == "auto":
            key = chunk_loss, inner, *(tensor.shape for tensor in batch)
            if key not in self._auto_chunks:
                self.captured_calls.forget()  # whose memory would count as free
                self._auto_chunks[key] = measured_chunk_size(chunk_loss, theta, batch, inner)
            size = self._auto_chunks[key]
        for start in range(0, tasks, size):
            yield TaskBatch(*(tensor[start : start + size] for tensor in batch))


def _training_loss(
    network: nn.Module, loss: Loss, workarounds: Workarounds, inner: InnerLoop
) -> ChunkLoss:
    adapted = adapted_names(network, inner.adapt)
    shared = trainable_parameters(network).keys() - set(adapted)
    return vectorized_loss(network, loss, workarounds, adapted, frozenset(shared))


def _evaluation_loss(
    network: nn.Module, loss: Loss, workarounds: Workarounds, inner: InnerLoop
) -> ChunkLoss:
    """Share no parameters: a product of all tasks' points with one matrix would round differently for
    each number of tasks.
    """
    adapted = adapted_names(network, inner.adapt)
    return vectorized_loss(network, loss, workarounds, adapted, shared=frozenset())


def at_least_two_tasks(chunk: TaskBatch) -> TaskBatch:
    """Repeat a task that is alone in its chunk.

    PyTorch computes a batch of one with other kernels, whose rounding differs. With two or more tasks,
    the result of each task is the same on a CPU, bit for bit, for any number of tasks.
    """
    return TaskBatch(*(torch.cat([t, t]) for t in chunk)) if len(chunk.support_x) == 1 else chunk


def mean_of_chunks(results: list[ChunkGradient]) -> ChunkGradient:
    """Put the chunks of a batch together, with the mean of the gradients of all tasks."""
    inner_losses = torch.cat([result.inner_losses for result in results])
    return ChunkGradient(
        inner_losses,
        prediction=torch.cat([result.prediction for result in results]),
        gradient=_mean([result.gradient for result in results], tasks=len(inner_losses)),
        rates=_mean([result.rates for result in results], tasks=len(inner_losses)),
    )


def to_meta_gradient(result: ChunkGradient, batch: TaskBatch, metric: Loss | None) -> MetaGradient:
    """Return the meta-gradient of a batch, given the mean over its tasks."""
    measured = None if metric is None else measure_each_task(metric, result.prediction, batch.query_y)
    losses = result.inner_losses
    return MetaGradient(losses[:, -1].mean(), result.gradient, losses, measured, result.rates)


def _mean(gradients: list[Parameters], tasks: int) -> Parameters:
    total = gradients[0]
    for gradient in gradients[1:]:
        total = {name: g + gradient[name] for name, g in total.items()}
    return {name: g / tasks for name, g in total.items()}


def _eager_meta_gradient(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, workarounds: Workarounds
) -> LossesAndGradient:
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    chunk_loss = _training_loss(network, loss, workarounds, inner)
    with workarounds.preserved_attributes(network):
        result = chunk_gradient(chunk_loss, theta, batch, inner)
    gradient, rates = (_mean([g], tasks=len(batch.support_x)) for g in (result.gradient, result.rates))
    return LossesAndGradient(result.inner_losses, gradient, rates)


def _query_losses(
    network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop, workarounds: Workarounds
) -> LossesAndGradient:
    theta = {name: p.detach() for name, p in trainable_parameters(network).items()}
    chunk_loss = _evaluation_loss(network, loss, workarounds, inner)
    predict_each = plain_predictions(network, workarounds)
    with workarounds.preserved_attributes(network):
        curves = chunk_curves(
            chunk_loss, predict_each, {"loss": loss}, theta, batch, inner, transductive=True
        )
    return LossesAndGradient(curves["loss"], {}, {})


META_GRADIENT = Computation(
    engine="vectorized",
    compute=_eager_meta_gradient,
    is_evaluation=False,
    uses_vmap=True,
    uses_clones=False,
    error_remedy="use engine learn2learn",
    random_remedy="use engine learn2learn",
    remedy="read parameters from the attributes that hold them, or use engine learn2learn",
)
EVALUATION = META_GRADIENT._replace(compute=_query_losses, is_evaluation=True)
