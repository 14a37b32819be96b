"""Batches of tasks, divided into chunks that threads carry out."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.native.chunk import ChunkResult, Examples, curves, meta_gradient
from maml_pipeline.meta_gradient.native.layout import Layout, layout
from maml_pipeline.meta_gradient.native.memory import allocate
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.schedule import schedule
from maml_pipeline.tasks import TaskBatch

TASKS_PER_CHUNK = 32
"""For networks without blocks, where a call from Python takes as long as several tasks."""


class BatchResult(NamedTuple):
    """Losses `(T, k + 1)`, query predictions `(T, Q, outputs)`, and the meta-gradient of their mean."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


def batch_meta_gradient(
    network: FeedForward, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> BatchResult:
    """Compute the meta-gradient of T tasks.

    A chunk has one task if the network has blocks: a thread holds one task's intermediate values at a
    time. The result does not depend on the number of threads, bit for bit: each chunk has its own sum.

    Args:
        network: The network.
        theta: Its initial parameters.
        batch: T tasks.
        inner: Inner loop and gradient order.
    """
    packed, method = network.pack(theta), Method(inner.method)
    plan = schedule(method, inner.steps, inner.first_differentiated_step)
    layouts = _layouts(network, batch.support_x, batch.query_x, batch.support_y)
    support = examples(network, batch.support_x, batch.support_y)
    query = examples(network, batch.query_x, batch.query_y)
    tasks, queries = batch.query_x.shape[:2]
    chunks = _chunks(network, tasks)
    # Other threads must not allocate: PyTorch counts the memory of this one.
    gradients = packed.new_zeros(len(chunks), 1, packed.numel())
    prediction = packed.new_empty(tasks, queries, network.dense[-1][1])
    losses = packed.new_empty(inner.steps + 1, tasks)

    def run(chunk: int, memory: Any) -> None:
        part = chunks[chunk]
        result = ChunkResult(gradients[chunk].numpy(), prediction[part].numpy(), losses[:, part].numpy())
        meta_gradient(
            layouts,
            packed[None].numpy(),
            support.tasks(part),
            query.tasks(part),
            inner.lr,
            plan,
            memory,
            result,
        )

    _run_chunks(run, len(chunks), lambda: allocate(packed, layouts, _size(chunks[0]), plan))
    gradient = gradients.sum(0)[0] / tasks
    return BatchResult(
        losses.T,
        prediction,
        network.unpack(gradient, {name: torch.zeros_like(p) for name, p in theta.items()}),
    )


class BatchCurves(NamedTuple):
    """Adapted parameters and predictions of T tasks.

    Args:
        adapted: Parameters after the last inner step, each `(T, ...)`.
        predictions: Predictions before each step `(k, sets, T, Q, outputs)`.
    """

    adapted: Parameters
    predictions: Tensor


def batch_curves(
    network: FeedForward,
    theta: Parameters,
    batch: TaskBatch,
    inner: InnerLoop,
    sets: list[Tensor],
) -> BatchCurves:
    """Adapt T tasks and predict sets of examples before each inner step.

    Args:
        network: The network.
        theta: Its initial parameters.
        batch: T tasks.
        inner: Inner learning rate and number of steps k.
        sets: Inputs that are predicted, each `(T, Q, ...)`; may be empty.
    """
    packed, plan = network.pack(theta), schedule(Method.UNROLLED, 0, 0)
    predicted = sets[0] if sets else batch.query_x
    layouts = _layouts(network, batch.support_x, predicted, batch.support_y)
    support = examples(network, batch.support_x, batch.support_y)
    inputs = [images_last(network, x) for x in sets]
    tasks, queries = predicted.shape[:2]
    chunks = _chunks(network, tasks)
    adapted = packed.new_empty(tasks, packed.numel())
    predictions = packed.new_empty(inner.steps, len(sets), tasks, queries, network.dense[-1][1])

    def run(chunk: int, memory: Any) -> None:
        part = chunks[chunk]
        curves(
            layouts,
            packed[None].numpy(),
            support.tasks(part),
            [x[part] for x in inputs],
            inner.lr,
            inner.steps,
            memory,
            adapted[part].numpy(),
            predictions[:, :, part].numpy(),
        )

    _run_chunks(run, len(chunks), lambda: allocate(packed, layouts, _size(chunks[0]), plan))
    return BatchCurves(network.unpack(adapted, theta), predictions)


def examples(network: FeedForward, x: Tensor, y: Tensor) -> Examples:
    """Convert sets of T tasks: inputs `(T, S, ...)`, and labels `(T, S)` or values `(T, S, outputs)`."""
    nothing = x.new_empty(len(y), 0, 0)
    if y.is_floating_point():
        labels, values = torch.empty(len(y), 0, dtype=torch.int64), y.contiguous()
    else:
        labels, values = y.contiguous(), nothing
    return Examples(images_last(network, x), labels.numpy(), values.numpy())


def images_last(network: FeedForward, x: Tensor) -> Any:
    """Convert inputs `(T, S, ...)` to an array; of images to `(T, S * height * width, channels)`."""
    if network.blocks:
        x = x.movedim(-3, -1).reshape(len(x), -1, x.shape[-3])
    return x.contiguous().numpy()


def _layouts(network: FeedForward, support: Tensor, query: Tensor, y: Tensor) -> tuple[Layout, Layout]:
    classifies, size = not y.is_floating_point(), support.element_size()
    return (
        _layout(network, tuple(support.shape[1:]), size, classifies),
        _layout(network, tuple(query.shape[1:]), size, classifies),
    )


_layout = lru_cache(layout)


def _chunks(network: FeedForward, tasks: int) -> list[slice]:
    size = 1 if network.blocks else TASKS_PER_CHUNK
    return [slice(start, min(start + size, tasks)) for start in range(0, tasks, size)]


def _size(chunk: slice) -> int:
    return int(chunk.stop - chunk.start)


def _run_chunks(run: Callable[[int, Any], None], chunks: int, allocate: Callable[[], Any]) -> None:
    """Run chunks on PyTorch's number of threads, each with memory of its own."""
    threads = min(torch.get_num_threads(), chunks)
    remaining: Iterator[int] = iter(range(chunks))  # shared: each thread takes the next chunk
    memories = [allocate() for _ in range(threads)]

    def work(memory: Any) -> None:
        for chunk in remaining:
            run(chunk, memory)

    with one_thread_per_product():
        others = [_pool(threads - 1).submit(work, memory) for memory in memories[1:]]
        work(memories[0])
        for other in others:
            other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native")


@contextmanager
def one_thread_per_product() -> Iterator[None]:
    """Keep SciPy's BLAS from starting threads of its own beside those of the chunks."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
