"""Memory figures from the allocator itself: exact, and the same every time."""

import os
from collections.abc import Callable

import psutil
import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Measure the most bytes of tensors that a call holds at once, beyond those there before it.

    Call the function once before, where first calls fill caches.

    Args:
        function: What to measure; its result is counted too.
        device: Where its tensors live. On the CPU the figure comes from the allocator's own events,
            on CUDA from its peak of requested bytes.
    """
    device = torch.device(device)
    return _cuda_peak(function, device) if device.type == "cuda" else _cpu_peak(function)


def _cpu_peak(function: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler says that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    held = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _cuda_peak(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    result = function()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - before
    del result
    return peak


def available_bytes(device: torch.device) -> int:
    """Return how much memory is still free on the device, for this process and its neighbours."""
    if device.type == "cuda":
        # What PyTorch's allocator has set aside and does not use is free as well.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    return int(psutil.virtual_memory().available)
