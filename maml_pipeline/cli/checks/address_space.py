"""Limit memory while the sizes in a configuration are tried out."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit allocations to the memory of the machine.

    A kernel that overcommits grants any size and kills the process when it is used. Within this context,
    a size that is too large raises the error of Python or PyTorch instead. Without effect if there is a
    GPU, because CUDA reserves addresses for all memory of the machine.
    """
    if torch.cuda.is_available():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Relative to the reserved addresses, which exceed the used memory.
    most = psutil.Process().memory_info().vms + psutil.virtual_memory().total
    if before[1] != resource.RLIM_INFINITY:
        most = min(most, before[1])
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
