"""The fastest engine on a CPU: machine code for this project's networks, one task on each thread."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient.adaptation import ChunkGradient
from maml_pipeline.meta_gradient.chunk_loss import plain_predictions
from maml_pipeline.meta_gradient.engine import MetaGradient, differentiable
from maml_pipeline.meta_gradient.evaluation import measure_each_task
from maml_pipeline.meta_gradient.exactness import Workarounds
from maml_pipeline.meta_gradient.inner_loop import (
    InnerLoop,
    Loss,
    Parameters,
    adapted_names,
)
from maml_pipeline.meta_gradient.methods import chunk_gradient
from maml_pipeline.meta_gradient.native.network import FeedForward, feed_forward
from maml_pipeline.meta_gradient.vectorized_engine import (
    VectorizedEngine,
    mean_of_chunks,
    to_meta_gradient,
)
from maml_pipeline.tasks import Task, TaskBatch

TASKS_OF_LOSSES = 32
"""Tasks of a chunk with the method `hessian_free` or learned rates, which keep parameters of each."""

BYTES_OF_SETS = 2**26
"""Most bytes of the sets that an evaluation predicts after one adaptation, unless one set is larger."""


class Known(NamedTuple):
    """A network that runs as machine code.

    Args:
        network: Its layers.
        theta: Its parameters, detached.
    """

    network: FeedForward
    theta: Parameters


class NativeEngine(VectorizedEngine):
    """Run networks that it knows as machine code on a CPU; any other as `VectorizedEngine` does.

    It knows `ConvNet`, `MLP`, and sequences of fully connected layers with ReLUs in between, with the
    cross-entropy or the mean squared error, in float32 or float64. Their gradients and Hessian-vector
    products are written out in closed form (`native/`) and compiled by numba: once on a machine, which
    takes seconds, and kept on disk.

    Time: little more than that of the matrix products. Memory: that of the method for one task on each
    of PyTorch's threads, and one gradient for each task.

    With `hessian_free`, and with learned rates in first order, the losses and their gradients alone are
    machine code.

    When to use: always; another network is as fast as with `VectorizedEngine`.

    Weakness: no other network, loss or device gets faster, nor partial adaptation, nor learned rates in
    second order.

    Args:
        tasks_per_chunk: As for `VectorizedEngine`, for what is not machine code; also of `hessian_free`
            and learned rates, by default 32.

    Raises:
        UserError: `tasks_per_chunk` is below 1.
    """

    def __reduce__(self) -> tuple[type["NativeEngine"], tuple[object, ...]]:
        return NativeEngine, (self.tasks_per_chunk,)

    def meta_gradient(
        self,
        network: nn.Module,
        loss: Loss,
        batch: TaskBatch,
        inner: InnerLoop,
        metric: Loss | None = None,
    ) -> MetaGradient:
        """See `Engine.meta_gradient`."""
        known = known_network(network, loss, batch, inner)
        if known is None:
            if not inner.needs_second_derivatives and (
                losses := known_losses(network, loss, batch, inner)
            ):
                with differentiable(batch) as batch:
                    return self._from_losses(losses, batch, inner, metric)
            return super().meta_gradient(network, loss, batch, inner, metric)
        result = _compiled().batch_meta_gradient(*known, batch, inner)
        mean = ChunkGradient(result.inner_losses, result.prediction, result.gradient, rates={})
        return to_meta_gradient(mean, batch, metric)

    def _from_losses(
        self, known: Known, batch: TaskBatch, inner: InnerLoop, metric: Loss | None
    ) -> MetaGradient:
        """Compute a meta-gradient that takes no second derivatives, with losses as machine code."""
        losses, (layers, theta) = _chunk_losses(), known
        if inner.rates is None:  # one vector takes fewer operations than many parameters
            chunk_loss, start = losses.packed_chunk_loss(layers), {losses.PACKED: layers.pack(theta)}
        else:
            chunk_loss, start = losses.named_chunk_loss(layers, tuple(theta)), theta
        size = self.tasks_per_chunk if isinstance(self.tasks_per_chunk, int) else TASKS_OF_LOSSES
        chunks = (
            TaskBatch(*(tensor[first : first + size] for tensor in batch))
            for first in range(0, len(batch.query_x), size)
        )
        results = [chunk_gradient(chunk_loss, start, chunk, inner) for chunk in chunks]
        result = mean_of_chunks(results)
        if inner.rates is None:
            gradient = layers.unpack(result.gradient[losses.PACKED], theta)
            gradient |= {name: torch.zeros_like(theta[name]) for name in theta.keys() - layers.names}
            result = result._replace(gradient=gradient)
        return to_meta_gradient(result, batch, metric)

    def check(self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
        """See `Engine.check`; the derivatives of a network that it knows are exact."""
        if known_network(network, loss, batch, inner) is None:
            super().check(network, loss, batch, inner)

    def check_evaluation(
        self, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
    ) -> None:
        """See `Engine.check_evaluation`."""
        if known_network(network, loss, batch, inner) is None:
            super().check_evaluation(network, loss, batch, inner)

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
        known = known_network(network, loss, batch, inner)
        if known is None:
            return super().adaptation_curves(network, measures, loss, batch, inner, transductive)
        curves: dict[str, list[Tensor]] = {name: [] for name in measures}
        with torch.no_grad():
            groups = [
                self._predictions(network, known, batch, inner, sets, transductive)
                for sets in query_sets(batch, transductive)
            ]
            for prediction in torch.cat(groups, dim=2):
                for name, measure in measures.items():
                    curves[name].append(measure_each_task(measure, prediction, batch.query_y))
        return {name: torch.stack(values, dim=1) for name, values in curves.items()}

    def _predictions(
        self,
        network: nn.Module,
        known: Known,
        batch: TaskBatch,
        inner: InnerLoop,
        sets: list[Tensor],
        transductive: bool,
    ) -> Tensor:
        """Predict the query points of some sets before each inner step and after the last one.

        Returns:
            `(k + 1, T, Q, outputs)`.
        """
        adapted, predictions = _compiled().batch_curves(*known, batch, inner, sets)
        predict = plain_predictions(network, Workarounds())
        last = torch.stack([predict(adapted, x) for x in sets])
        all_sets = torch.cat([predictions, last[None]])
        return all_sets[:, 0] if transductive else all_sets[..., -1, :].movedim(1, 2)

    def adapted_parameters(
        self, network: nn.Module, loss: Loss, support_x: Tensor, support_y: Tensor, inner: InnerLoop
    ) -> Parameters:
        """See `Engine.adapted_parameters`."""
        task = TaskBatch.stack([Task(support_x, support_y, support_x, support_y)])
        known = known_network(network, loss, task, inner)
        if known is None:
            return super().adapted_parameters(network, loss, support_x, support_y, inner)
        adapted = _compiled().batch_curves(*known, task, inner, []).adapted
        return {name: p[0].clone() for name, p in adapted.items()}


def _compiled() -> Any:
    """Import what runs the compiled functions: late, since importing numba takes 0.2 s."""
    from maml_pipeline.meta_gradient.native import batch

    return batch


def _chunk_losses() -> Any:
    """Import the losses of the compiled functions late, as above."""
    from maml_pipeline.meta_gradient.native import chunk_losses

    return chunk_losses


def query_sets(batch: TaskBatch, transductive: bool) -> Iterator[list[Tensor]]:
    """Yield the sets of inputs that an evaluation predicts, in groups that bound the memory.

    See `evaluation.predict_query`.
    """
    if transductive:
        yield [batch.query_x]
        return
    queries = batch.query_x.shape[1]
    set_bytes = batch.support_x.nbytes + batch.query_x[:, :1].nbytes
    size = max(1, BYTES_OF_SETS // set_bytes)
    for first in range(0, queries, size):
        yield [
            torch.cat([batch.support_x, batch.query_x[:, q : q + 1]], dim=1)
            for q in range(first, min(first + size, queries))
        ]


def known_network(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> Known | None:
    """Describe a network if its whole inner loop can run as machine code, otherwise `None`."""
    if inner.rates is not None or not (inner.is_first_order or inner.needs_second_derivatives):
        return None
    return known_losses(network, loss, batch, inner)


def known_losses(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> Known | None:
    """Describe a network if its losses and their gradients can run as machine code, otherwise `None`."""
    theta = dict(network.named_parameters())
    known = feed_forward(network, theta)
    if known is None or torch.is_autocast_enabled("cpu"):
        return None
    if inner.adapt is not None and len(adapted_names(network, inner.adapt)) < len(theta):
        return None
    if len(batch.support_x) != len(batch.query_x) or not all(tensor.is_cpu for tensor in batch):
        return None
    dtype = next(iter(theta.values())).dtype
    outputs = known.outputs
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        if x.dtype != dtype or x.shape[2:] == () or not known.accepts(tuple(x.shape[2:])):
            return None
        if is_mean_squared_error(loss):
            if y.dtype != dtype or y.shape != (*x.shape[:2], outputs):
                return None
        elif is_cross_entropy(loss):
            is_class = y.dtype == torch.int64 and y.shape == x.shape[:2]
            if not is_class or not 0 <= int(y.min()) <= int(y.max()) < outputs:
                return None
        else:
            return None
    return Known(known, {name: p.detach() for name, p in theta.items()})


def is_mean_squared_error(loss: Loss) -> bool:
    """Tell whether a loss is the mean squared error."""
    return loss is mse_loss or (type(loss) is nn.MSELoss and loss.reduction == "mean")


def is_cross_entropy(loss: Loss) -> bool:
    """Tell whether a loss is the mean cross-entropy, without weights, smoothing or ignored classes."""
    return loss is cross_entropy or (
        type(loss) is nn.CrossEntropyLoss
        and loss.weight is None
        and loss.reduction == "mean"
        and loss.label_smoothing == 0
        and loss.ignore_index < 0  # no label that `known_network` accepts
    )
