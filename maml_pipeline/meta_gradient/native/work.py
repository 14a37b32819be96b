"""Working memory of the compiled functions."""

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from maml_pipeline.meta_gradient.native.layout import FILTERS, INPUTS, OUTPUTS, ROWS, Layout


class Work(NamedTuple):
    """What the compiled functions need for one task at a time: flat arrays, named by what they hold.

    Args:
        columns: A part of columns.
        sums: Two weights.
        features: Gradient by the features.
        u_dot: Tangent of u; also the gradient by z of a record that is kept.
        columns_dot: Tangent of a part of columns.
        part: Two inputs or outputs of a fully connected layer, or z of a part of the pixels.
        prediction_dot: Tangent of the prediction.
        delta_dot: Tangent of the gradient by the output of a fully connected layer.
    """

    columns: Any
    sums: Any
    features: Any
    u_dot: Any
    columns_dot: Any
    part: Any
    prediction_dot: Any
    delta_dot: Any


def work_sizes(layouts: tuple[Layout, ...], is_first_order: bool) -> dict[str, int]:
    """Return the size of each part of `Work`; the last five are needed for second order alone."""
    support = layouts[0]
    examples = max(layout.examples for layout in layouts)
    widest = int(max(support.dense[:, INPUTS].max(), support.dense[:, OUTPUTS].max()))
    pixels_at_once = max((int(row[ROWS] * row[FILTERS]) for row in support.blocks), default=0)
    sizes = {
        "columns": max(layout.columns for layout in layouts),
        "sums": 2 * support.largest_weight,
        "features": examples * int(support.dense[0, INPUTS]) if len(support.blocks) else 0,
        "u_dot": support.largest_u,
        "columns_dot": support.columns,
        "part": max(2 * support.examples * widest, pixels_at_once),
        "prediction_dot": support.examples * widest,
        "delta_dot": support.examples * widest,
    }
    if is_first_order:
        sizes |= dict.fromkeys(("u_dot", "columns_dot", "part", "prediction_dot", "delta_dot"), 0)
    return sizes


def arrays(sizes: dict[str, int], like: Tensor) -> dict[str, Any]:
    """Divide one tensor of PyTorch's allocator into flat arrays, so that it counts as PyTorch's memory."""
    memory = like.new_empty(sum(sizes.values())).numpy()
    parts = np.split(memory, np.cumsum([*sizes.values()])[:-1])
    return dict(zip(sizes, parts, strict=True))
