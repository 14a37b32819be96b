"""Memory figures from the allocator itself: exact, and the same every time."""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import psutil
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from maml_pipeline.environment import KINETO_LOG_LEVEL


class Peak(NamedTuple):
    """The most bytes that tensors held at once, beyond those held at the start.

    `requested` is what was asked for: on the CPU by the allocator's own events, on CUDA by its peak of
    requested bytes. `active` is what the allocator gave out for it, rounded up to its blocks; on the
    CPU, which rounds nothing, the same.
    """

    requested: int
    active: int


class PeakMeter:
    """Measures the peak of everything between `start` and `stop`.

    Python's garbage collector rests meanwhile: it would free what lay about from before at a moment
    that depends on all that the process has done.

    Args:
        device: Where the tensors live.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def start(self) -> None:
        """Begin; what is held now counts as nothing."""
        self._collects_garbage = gc.isenabled()
        gc.disable()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = self._cuda_bytes("current")
        else:
            with KINETO_LOG_LEVEL.defaulting_to("99"):
                self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self._profiler.start()

    def stop(self) -> Peak:
        """End, and return the peak."""
        if self._collects_garbage:
            gc.enable()
        if self.device.type == "cuda":
            # The allocator works on the host, ahead of the GPU: there is nothing to wait for.
            peaks = zip(self._cuda_bytes("peak"), self._before, strict=True)
            return Peak(*(peak - before for peak, before in peaks))
        self._profiler.stop()
        peak = _highest(self._profiler)
        del self._profiler
        return Peak(peak, peak)

    def _cuda_bytes(self, which: str) -> tuple[int, int]:
        stats = torch.cuda.memory_stats(self.device)
        return stats[f"requested_bytes.all.{which}"], stats[f"active_bytes.all.{which}"]


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the most bytes of tensors that a call holds at once, beyond those there before it.

    Call the function once before, where first calls fill caches.

    Args:
        function: What to measure; its result is counted too.
        device: Where its tensors live; see `Peak.requested`.
    """
    meter = PeakMeter(device)
    meter.start()
    result = function()
    peak = meter.stop().requested
    del result
    return peak


def _highest(profiler: profile) -> int:
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    allocations = sorted(
        _allocations(results.experimental_event_tree()), key=lambda event: event.start_time_ns
    )
    sizes: dict[int, int] = {}
    held = highest = 0
    for event in allocations:
        fields = event.extra_fields
        if fields.alloc_size > 0:
            sizes[fields.ptr] = fields.alloc_size
            held += fields.alloc_size
        else:
            # What was there before counts as nothing, and so does its going.
            held -= sizes.pop(fields.ptr, 0)
        highest = max(highest, held)
    return highest


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def available_bytes(device: torch.device) -> int:
    """Return how much memory is still free on the device, for this process and its neighbours."""
    if device.type == "cuda":
        # What PyTorch's allocator has set aside and does not use is free as well.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)
