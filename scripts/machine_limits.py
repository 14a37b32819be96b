"""Measure the limits of the machine, for benchmarks: FLOP/s of matrix products, bytes/s of memory."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Limits(NamedTuple):
    """Rates with PyTorch's current number of threads: matrix products in FLOP/s, copies in bytes/s."""

    flops_per_second: float
    bytes_per_second: float

    def __str__(self) -> str:
        return (
            f"2,048 x 2,048 float32 matrix product {self.flops_per_second / 1e9:.0f} GFLOP/s, "
            f"memory {self.bytes_per_second / 1e9:.0f} GB/s (read and written)"
        )


def machine_limits(device: torch.device, repeats: int = 9) -> Limits:
    """Measure the limits, which takes a few seconds.

    Args:
        device: CPU or CUDA device.
        repeats: Timed repeats, of which the median counts.
    """
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(64 * 2**20, device=device)  # 256 MB, beyond any cache
    target = torch.empty_like(source)
    return Limits(
        2 * 2048**3 / _seconds(lambda: torch.mm(a, b, out=product), device, repeats),
        2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device, repeats),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
