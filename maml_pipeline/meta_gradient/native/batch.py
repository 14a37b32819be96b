"""Batches of tasks, divided into chunks that threads carry out."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.native import chunk, perceptron
from maml_pipeline.meta_gradient.native.examples import Examples
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
    planned = plan(
        network,
        _sets(batch, batch.query_x),
        Method(inner.method),
        inner.steps,
        inner.first_differentiated_step,
    )
    packed = network.pack(theta)
    support = examples(network, batch.support_x, batch.support_y)
    query = examples(network, batch.query_x, batch.query_y)
    # Other threads must not allocate: PyTorch counts the memory of this one.
    sizes = planned.result_sizes(packed.numel(), network.outputs)
    results = packed.new_zeros(sum(sizes))
    sums, predictions, losses = results.split_with_sizes(sizes)
    sums = sums.view(len(planned.chunks), -1)
    predictions = predictions.view(*batch.query_x.shape[:2], -1)
    losses = losses.view(inner.steps + 1, -1)
    initial, arrays = packed.numpy(), (predictions.numpy(), losses.numpy())
    gradients = sums.numpy()
    carry_out = chunk.meta_gradient if network.blocks else perceptron.meta_gradient

    def run(number: int, memory: Any) -> None:
        carry_out(
            *(planned, planned.chunks[number], initial, support, query, inner.lr, memory),
            *(gradients[number], *arrays),
        )

    _run_chunks(run, planned, packed)
    gradient = network.unpack(sums.sum(0).div_(len(support.inputs)), theta)
    for name in theta.keys() - network.names:
        gradient[name] = torch.zeros_like(theta[name])
    return BatchResult(losses.T, predictions, gradient)


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
    adapted = packed.new_empty(len(support.inputs), packed.numel())
    predictions = packed.new_empty(inner.steps, len(sets), *predicted.shape[:2], network.outputs)
    initial, arrays = packed.numpy(), (adapted.numpy(), predictions.numpy())
    carry_out = chunk.curves if network.blocks else perceptron.curves

    def run(number: int, memory: Any) -> None:
        carry_out(
            *(planned, planned.chunks[number], initial, support, inputs, inner.lr, memory, *arrays)
        )

    _run_chunks(run, planned, packed)
    return BatchCurves(network.unpack(adapted, theta), predictions)


def examples(network: FeedForward, x: Tensor, y: Tensor) -> Examples:
    """Convert sets of T tasks: inputs `(T, S, ...)`, and labels `(T, S)` or values `(T, S, outputs)`."""
    inputs, targets, tasks = images_last(network, x), y.contiguous().numpy(), y.shape[0]
    if y.is_floating_point():
        return Examples(inputs, np.empty((tasks, 0), np.int64), targets)
    return Examples(inputs, targets, np.empty((tasks, 0, 0), inputs.dtype))


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


def _run_chunks(run: Callable[[int, Any], None], planned: Plan, like: Tensor) -> None:
    """Run chunks on PyTorch's number of threads, each with memory of its own."""
    threads = min(torch.get_num_threads(), len(planned.chunks))
    remaining: Iterator[int] = iter(range(len(planned.chunks)))  # each thread takes the next one
    memories = [planned.allocate(like) for _ in range(threads)]

    def work(memory: Any) -> None:
        for number in remaining:
            run(number, memory)

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
