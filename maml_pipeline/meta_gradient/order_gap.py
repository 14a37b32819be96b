"""How far the first-order meta-gradient is from the second-order one."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from maml_pipeline.meta_gradient.inner_loop import Parameters


class OrderGap(NamedTuple):
    """What first order leaves out: g_1 is the first-order meta-gradient, g_2 the second-order one.

    `cosine` is <g_1, g_2> / (|g_1| |g_2|), `norm_ratio` |g_1| / |g_2| and `relative_error`
    |g_1 - g_2| / |g_2|; not a number where a norm that divides is zero. Equal gradients give 1, 1, 0.
    """

    cosine: float
    norm_ratio: float
    relative_error: float


def order_gaps(first: Parameters, second: Parameters) -> dict[str, OrderGap]:
    """Compare the meta-gradients of both orders, layer by layer and as a whole, in float64.

    Args:
        first: The first-order meta-gradient by parameter.
        second: The second-order one, of the same parameters.

    Returns:
        By name of the module that holds the parameters; under `""` the gap of all together.
    """
    layers: dict[str, list[str]] = {}
    for name in first:
        layer = name.rpartition(".")[0]
        layers.setdefault(layer, []).append(name)
    layers[""] = [*first]  # also where the network is one layer
    # One transfer from the device for all: each by itself would wait for it.
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
