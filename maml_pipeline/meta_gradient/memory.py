"""Memory measured from the allocator: exact and reproducible."""

import gc
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from maml_pipeline.environment import KINETO_LOG_LEVEL
from maml_pipeline.torch_internals import cpu_allocations


class Peak(NamedTuple):
    """Peak memory of tensors in bytes, above what was allocated at the start.

    Args:
        requested: Bytes requested from the allocator.
        active: Bytes that the allocator handed out for them, rounded up to its block sizes on CUDA;
            the same as `requested` on the CPU.
    """

    requested: int
    active: int


class PeakMeter:
    """Measure the peak between `start` and `stop`.

    Python's garbage collector is disabled in between: it would free earlier objects at a moment that
    depends on everything that the process has done.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def start(self) -> None:
        """Start measuring; what is allocated now counts as zero."""
        self._collects_garbage = gc.isenabled()
        gc.disable()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = self._cuda_bytes("current")
        else:
            # Kineto warns on the CPU that there is no GPU.
            with KINETO_LOG_LEVEL.defaulting_to("99"):
                self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self._profiler.start()

    def stop(self) -> Peak:
        """Stop measuring and return the peak."""
        if self._collects_garbage:
            gc.enable()
        if self.device.type == "cuda":
            # No synchronisation: the allocator runs on the host, ahead of the GPU.
            peaks = zip(self._cuda_bytes("peak"), self._before, strict=True)
            return Peak(*(peak - before for peak, before in peaks))
        self._profiler.stop()
        peak = _cpu_peak(self._profiler)
        del self._profiler
        return Peak(peak, peak)

    def _cuda_bytes(self, which: str) -> tuple[int, int]:
        stats = torch.cuda.memory_stats(self.device)
        return stats[f"requested_bytes.all.{which}"], stats[f"active_bytes.all.{which}"]


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the peak memory of a call in requested bytes, above what was allocated before it.

    Call the function once before measuring if its first call fills caches.

    Args:
        function: What to measure, including its result.
        device: Device of its tensors.
    """
    meter = PeakMeter(device)
    meter.start()
    try:
        result = function()
    finally:  # also if memory is too small, which `measured_chunk_size` survives
        peak = meter.stop()
    del result
    return peak.requested


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes, including what PyTorch reserves but does not use."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)


def _cpu_peak(profiler: profile) -> int:
    sizes: dict[int, int] = {}
    held = highest = 0
    for allocation in cpu_allocations(profiler):
        if allocation.size > 0:
            sizes[allocation.address] = allocation.size
            held += allocation.size
        else:
            # What was allocated before the start counts as zero, and so does freeing it.
            held -= sizes.pop(allocation.address, 0)
        highest = max(highest, held)
    return highest
