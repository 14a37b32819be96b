"""How many tasks adapt at once, as many as fit into memory."""

import logging
from collections.abc import Callable

import torch

from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.memory import available_bytes, peak_bytes
from maml_pipeline.meta_gradient.methods import chunk_gradient
from maml_pipeline.tasks import TaskBatch

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.8


def measured_chunk_size(
    chunk_loss: ChunkLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
) -> int:
    """Measure meta-gradients of one and two tasks, and choose how many adapt at once."""
    device = batch.support_x.device

    def measure(tasks: int) -> int:
        chunk = TaskBatch(*(tensor[:tasks] for tensor in batch))
        chunk_gradient(chunk_loss, theta, chunk, inner)  # the first call fills caches
        return peak_bytes(lambda: chunk_gradient(chunk_loss, theta, chunk, inner), device)

    available = int(SHARE_OF_MEMORY * available_bytes(device))
    return largest_fitting_chunk(measure, len(batch.support_x), available)


def largest_fitting_chunk(measure: Callable[[int], int], tasks: int, available: int) -> int:
    """Choose how many tasks adapt at once, as many as fit into memory, and log the choice.

    Memory is affine in the number of tasks, so measuring one and two tasks predicts any number.

    Args:
        measure: Number of tasks -> peak bytes of their meta-gradient.
        tasks: Number of tasks of a batch, T.
        available: Bytes available.

    Returns:
        Between 1 and T: the smallest size that needs no more chunks than the largest that fits.
    """
    if tasks == 1:
        return 1
    one = measure(1)
    try:
        two = measure(2)
    except torch.OutOfMemoryError:
        logger.info("tasks_per_chunk: auto is 1 of %d tasks (two do not fit into memory)", tasks)
        return 1
    each = max(1, two - one)
    fitting = min(tasks, max(1, (available - one) // each + 1))
    chunks = -(-tasks // fitting)
    chosen = -(-tasks // chunks)
    logger.info(
        "tasks_per_chunk: auto is %d of %d tasks (%.4g MB for one, %.4g MB per other; %.4g MB free)",
        *(chosen, tasks, one / 1e6, each / 1e6, available / 1e6),
    )
    return chosen
