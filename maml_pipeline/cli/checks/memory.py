"""A bound on memory while the sizes in a configuration are tried out."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let no more be allocated than the machine has memory.

    A kernel that overcommits grants any size, and kills the process once it is used; within this,
    a size beyond the machine ends in Python's or PyTorch's own error. Not where there is a GPU: CUDA
    reserves addresses for all memory of the machine once it is used.
    """
    if torch.cuda.is_available():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Relative to what is reserved already, which is more than what is used.
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
