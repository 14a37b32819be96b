"""Batches of tasks, divided into chunks that threads carry out."""

import ctypes
import importlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.native.network import FeedForward
from maml_pipeline.meta_gradient.native.plan import (
    Plan,
    Sets,
    curves_plan,
    losses_plan,
    meta_gradient_plan,
)
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
    (tasks, queries), steps = batch.query_x.shape[:2], inner.steps
    method, first = Method(inner.method), inner.first_differentiated_step
    planned = meta_gradient_plan(network, _sets(batch, batch.query_x), method, steps, first)
    packed = network.pack(theta)
    # Other threads must not allocate: PyTorch counts the memory of this one.
    sizes = [
        len(planned.chunks) * packed.numel(),
        tasks * queries * network.outputs,
        tasks * (steps + 1),
    ]
    results = packed.new_empty(sum(sizes))
    results[sizes[0] :].zero_()
    sums, predictions, losses = results.split_with_sizes(sizes)
    support, query = (inputs_of(network, x) for x in (batch.support_x, batch.query_x))
    support_y, query_y = batch.support_y.contiguous(), batch.query_y.contiguous()
    regions = [packed, support, support_y, sums, predictions, query, query_y, losses]
    _run(planned, regions, inner.lr, cleared=sums)
    gradient = network.unpack(sums.view(-1, packed.numel()).sum(0).div_(tasks), theta)
    for name in theta.keys() - network.names:
        gradient[name] = torch.zeros_like(theta[name])
    return BatchResult(losses.view(-1, tasks).T, predictions.view(tasks, queries, -1), gradient)


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
    packed, tasks = network.pack(theta), len(batch.query_x)
    predicted = sets[0] if sets else batch.query_x
    planned = curves_plan(network, _sets(batch, predicted), inner.steps, len(sets))
    adapted = packed.new_empty(tasks, packed.numel())
    predictions = packed.new_empty(inner.steps, len(sets), *predicted.shape[:2], network.outputs)
    inputs = [inputs_of(network, x) for x in sets]
    support, support_y = inputs_of(network, batch.support_x), batch.support_y.contiguous()
    regions = [packed, support, support_y, adapted, predictions, *inputs]
    _run(planned, regions, inner.lr)
    return BatchCurves(network.unpack(adapted, theta), predictions)


class TaskLosses(NamedTuple):
    """Losses `(T,)`, predictions `(T, S, outputs)` and gradients `(T, P)`."""

    losses: Tensor
    predictions: Tensor
    gradients: Tensor


def batch_losses(network: FeedForward, theta: Tensor, x: Tensor, y: Tensor) -> TaskLosses:
    """Compute the loss of each task at parameters of its own, and its gradient.

    Args:
        network: The network.
        theta: Packed parameters `(T, P)`.
        x: Inputs `(T, S, ...)`.
        y: Labels `(T, S)` or values `(T, S, outputs)`.
    """
    planned = losses_plan(network, _sets(TaskBatch(x, y, x, y), x))
    result = TaskLosses(
        losses=theta.new_empty(len(x)),
        predictions=theta.new_empty(*x.shape[:2], network.outputs),
        gradients=torch.empty_like(theta),
    )
    inputs, targets = inputs_of(network, x), y.contiguous()
    regions = [theta, inputs, targets, result.gradients, result.predictions, inputs, targets]
    _run(planned, [*regions, result.losses], lr=0.0)
    return result


def inputs_of(network: FeedForward, x: Tensor) -> Tensor:
    """Return the inputs of T sets one after another, images with their channels last."""
    return (x.movedim(-3, -1) if network.blocks else x).contiguous()


def _sets(batch: TaskBatch, predicted: Tensor) -> Sets:
    return Sets(
        support=tuple(batch.support_x.shape[1:]),
        query=tuple(predicted.shape[1:]),
        tasks=len(predicted),
        classifies=not batch.support_y.is_floating_point(),
        bytes_each=predicted.element_size(),
    )


def _run(planned: Plan, regions: list[Tensor], lr: float, cleared: Tensor | None = None) -> None:
    """Run the chunks on PyTorch's number of threads, each with memory of its own.

    Args:
        planned: The job and the chunks.
        regions: The regions of the job, without the memory.
        lr: Inner learning rate.
        cleared: A tensor with a part for each chunk. Its thread sets it to zero, right before it adds to
            it: by then the part is in the core's cache.
    """
    threads = min(torch.get_num_threads(), len(planned.chunks))
    remaining: Iterator[int] = iter(range(len(planned.chunks)))  # each thread takes the next one
    memories = [regions[0].new_empty(planned.memory) for _ in range(threads)]
    addresses = [region.data_ptr() for region in regions]
    to_clear = None if cleared is None else cleared.data_ptr()
    clear_bytes = 0 if cleared is None else cleared.nbytes // len(planned.chunks)

    # Other threads get addresses, not tensors: a thread lets go of its arguments some time after it has
    # the result, and until then PyTorch would count memory as held.
    def work(memory: int) -> None:
        for number in remaining:
            part = planned.chunks[number]
            if to_clear is not None:
                ctypes.memset(to_clear + number * clear_bytes, 0, clear_bytes)
            planned.job.run([memory, *addresses], lr, number, part.start, part.stop)

    with _one_thread_per_product():
        own, *rest = (memory.data_ptr() for memory in memories)
        others: list[Future[None]] = []
        try:
            for address in rest:
                others.append(_executor(threads - 1).submit(work, address))
            work(own)
        finally:  # after an interrupt, too: the others write to the regions until they end
            for _ in remaining:
                pass
            wait(others)
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
