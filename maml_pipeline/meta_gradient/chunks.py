"""How many tasks fit into memory at once."""

import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)


def fitting_chunk(measure: Callable[[int], int], tasks: int, available: int) -> int:
    """Choose how many tasks adapt at once: as many as fit into memory. The choice is logged.

    Memory is affine in the number of tasks, so that what one task and two tasks need says what any
    number of them does.

    Args:
        measure: The peak in bytes of a meta-gradient of so many tasks.
        tasks: T, the most that are wanted.
        available: Bytes that may be used.

    Returns:
        At least 1, at most T; of the numbers that need the fewest chunks, the smallest.
    """
    if tasks == 1:
        return 1
    one, two = measure(1), measure(2)
    each = max(1, two - one)
    fitting = min(tasks, max(1, (available - one) // each + 1))
    chunks = -(-tasks // fitting)
    chosen = -(-tasks // chunks)
    logger.info(
        "tasks_per_chunk: auto is %d of %d tasks (%.4g MB, and %.4g MB with each more, of %.4g MB)",
        *(chosen, tasks, one / 1e6, each / 1e6, available / 1e6),
    )
    return chosen
