"""The order gap: how far the first-order meta-gradient is from the second-order one."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from maml_pipeline.meta_gradient.inner_loop import Parameters


class OrderGap(NamedTuple):
    """Differences of the first-order meta-gradient g_1 from the second-order one g_2.

    A value is NaN if it divides by a zero norm. Equal gradients give 1, 1 and 0.

    Args:
        cosine: <g_1, g_2> / (|g_1| |g_2|).
        norm_ratio: |g_1| / |g_2|.
        relative_error: |g_1 - g_2| / |g_2|.
    """

    cosine: float
    norm_ratio: float
    relative_error: float


def order_gaps(first: Parameters, second: Parameters) -> dict[str, OrderGap]:
    """Compare the meta-gradients of both orders by layer and in total, in float64.

    Args:
        first: First-order meta-gradient by parameter name.
        second: Second-order meta-gradient of the same parameters.

    Returns:
        The gap of each layer by module name, and the total under `""`.
    """
    layers: dict[str, list[str]] = {}
    for name in first:
        layer = name.rpartition(".")[0]
        layers.setdefault(layer, []).append(name)
    layers[""] = [*first]  # even if the network is a single layer
    # One transfer from the device instead of one per layer, each of which would synchronise.
    sums = torch.stack([_sums(names, first, second) for names in layers.values()]).tolist()
    return {layer: _gap(*values) for layer, values in zip(layers, sums, strict=True)}


def _sums(names: Iterable[str], first: Parameters, second: Parameters) -> torch.Tensor:
    """Return <g_1, g_2>, |g_1|^2, |g_2|^2 and |g_1 - g_2|^2."""
    g_1, g_2 = (torch.cat([g[name].flatten().double() for name in names]) for g in (first, second))
    difference = g_1 - g_2
    return torch.stack([g_1 @ g_2, g_1 @ g_1, g_2 @ g_2, difference @ difference])


def _gap(product: float, first: float, second: float, difference: float) -> OrderGap:
    norm_1, norm_2 = first**0.5, second**0.5
    nan = float("nan")
    return OrderGap(
        cosine=product / (norm_1 * norm_2) if norm_1 and norm_2 else nan,
        norm_ratio=norm_1 / norm_2 if norm_2 else nan,
        relative_error=difference**0.5 / norm_2 if norm_2 else nan,
    )
