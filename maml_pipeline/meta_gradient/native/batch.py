"""Batches of tasks, divided into chunks that threads carry out."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.native.chunk import (
    ChunkResult,
    Examples,
    Memory,
    curves,
    meta_gradient,
)
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.plan import Plan, Sets, plan
from maml_pipeline.tasks import TaskBatch


class BatchResult(NamedTuple):
    """Losses `(T, k + 1)`, query predictions `(T, Q, outputs)`, and the meta-gradient of their mean."""

    inner_losses: Tensor
    prediction: Tensor
    gradient: Parameters


class BatchCurves(NamedTuple):
    """Adapted parameters and predictions of T tasks.

    Args:
        adapted: Parameters after the last inner step, each `(T, ...)`.
        predictions: Predictions before each step `(k, sets, T, Q, outputs)`.
    """

    adapted: Parameters
    predictions: Tensor


def batch_meta_gradient(
    network: FeedForward, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> BatchResult:
    """Compute the meta-gradient of T tasks.

    The result does not depend on the number of threads, bit for bit: each chunk has its own sum.

    Args:
        network: The network.
        theta: Its initial parameters.
        batch: T tasks.
        inner: Inner loop and gradient order.
    """
    packed = network.pack(theta)
    planned = plan(
        network,
        _sets(batch, batch.query_x),
        Method(inner.method),
        inner.steps,
        inner.first_differentiated_step,
    )
    support = examples(network, batch.support_x, batch.support_y)
    query = examples(network, batch.query_x, batch.query_y)
    tasks, queries = batch.query_x.shape[:2]
    # Other threads must not allocate: PyTorch counts the memory of this one.
    gradients = packed.new_zeros(len(planned.chunks), packed.numel())
    prediction = packed.new_empty(tasks, queries, network.dense[-1][1])
    losses = packed.new_empty(inner.steps + 1, tasks)
    initial, sums = packed.numpy()[None], gradients.numpy()
    predictions, chunk_losses = prediction.numpy(), losses.numpy()

    def run(chunk: int, memory: Memory) -> None:
        part = planned.chunks[chunk]
        meta_gradient(
            planned.layouts,
            initial,
            support.tasks(part),
            query.tasks(part),
            inner.lr,
            planned.schedule,
            memory,
            ChunkResult(sums[chunk : chunk + 1], predictions[part], chunk_losses[:, part]),
        )

    _run_chunks(run, planned, packed)
    gradient = network.unpack(gradients.sum(0).div_(tasks), theta)
    for name in theta.keys() - network.names:
        gradient[name] = torch.zeros_like(theta[name])
    return BatchResult(losses.T, prediction, gradient)


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
    packed = network.pack(theta)
    predicted = sets[0] if sets else batch.query_x
    planned = plan(network, _sets(batch, predicted), Method.UNROLLED, 0, 0)
    support = examples(network, batch.support_x, batch.support_y)
    inputs = [images_last(network, x) for x in sets]
    tasks, queries = predicted.shape[:2]
    adapted = packed.new_empty(tasks, packed.numel())
    predictions = packed.new_empty(inner.steps, len(sets), tasks, queries, network.dense[-1][1])

    def run(chunk: int, memory: Memory) -> None:
        part = planned.chunks[chunk]
        curves(
            planned.layouts,
            packed.numpy()[None],
            support.tasks(part),
            [x[part] for x in inputs],
            inner.lr,
            inner.steps,
            memory,
            adapted.numpy()[part],
            predictions.numpy()[:, :, part],
        )

    _run_chunks(run, planned, packed)
    return BatchCurves(network.unpack(adapted, theta), predictions)


def examples(network: FeedForward, x: Tensor, y: Tensor) -> Examples:
    """Convert sets of T tasks: inputs `(T, S, ...)`, and labels `(T, S)` or values `(T, S, outputs)`."""
    if y.is_floating_point():
        labels, values = torch.empty(len(y), 0, dtype=torch.int64), y.contiguous()
    else:
        labels, values = y.contiguous(), x.new_empty(len(y), 0, 0)
    return Examples(images_last(network, x), labels.numpy(), values.numpy())


def images_last(network: FeedForward, x: Tensor) -> Any:
    """Convert inputs `(T, S, ...)` to an array; of images to `(T, S * height * width, channels)`."""
    if network.blocks:
        x = x.movedim(-3, -1).reshape(len(x), -1, x.shape[-3])
    return x.contiguous().numpy()


def _sets(batch: TaskBatch, predicted: Tensor) -> Sets:
    return Sets(
        support=tuple(batch.support_x.shape[1:]),
        query=tuple(predicted.shape[1:]),
        tasks=len(predicted),
        classifies=not batch.support_y.is_floating_point(),
        bytes_each=predicted.element_size(),
    )


def _run_chunks(run: Callable[[int, Memory], None], planned: Plan, like: Tensor) -> None:
    """Run chunks on PyTorch's number of threads, each with memory of its own."""
    threads = min(torch.get_num_threads(), len(planned.chunks))
    remaining: Iterator[int] = iter(range(len(planned.chunks)))  # each thread takes the next one
    memories = [planned.allocate(like) for _ in range(threads)]

    def work(memory: Memory) -> None:
        for chunk in remaining:
            run(chunk, memory)

    with _one_thread_per_product():
        others = [_executor(threads - 1).submit(work, memory) for memory in memories[1:]]
        work(memories[0])
        for other in others:
            other.result()


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native")


@contextmanager
def _one_thread_per_product() -> Iterator[None]:
    """Keep the BLAS of SciPy from starting threads of its own beside those of the chunks."""
    pools = [(pool, pool.num_threads) for pool in _thread_pools() if pool.num_threads != 1]
    for pool, _ in pools:
        pool.set_num_threads(1)
    try:
        yield
    finally:
        for pool, threads in pools:
            pool.set_num_threads(threads)


@cache
def _thread_pools() -> list[Any]:
    importlib.import_module("scipy.linalg.cython_blas")  # which loads the BLAS that numba calls
    return list(ThreadpoolController().select(internal_api="openblas").lib_controllers)
