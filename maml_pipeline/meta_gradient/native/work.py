"""Working memory of the compiled functions, for one task at a time."""

from typing import Any, NamedTuple

from maml_pipeline.meta_gradient.native.layout import FILTERS, INPUTS, OUTPUTS, ROWS, Layout


class Work(NamedTuple):
    """Flat arrays, named by what they hold.

    Args:
        columns: A part of columns; or half as much, and its tangent.
        sums: Two weights.
        features: Gradient by the features, if the network has blocks.
        delta: Gradient by z, if it may not overwrite u; the same as `u_dot` if nothing is pooled.
        u_dot: Tangent of u.
        part: Two inputs or outputs of a fully connected layer, or z of a part of the pixels of
            a block after the first.
        prediction_dot: Tangent of the prediction.
        delta_dot: Tangent of the gradient by the output of a fully connected layer.
    """

    columns: Any
    sums: Any
    features: Any
    delta: Any
    u_dot: Any
    part: Any
    prediction_dot: Any
    delta_dot: Any


def work_sizes(layouts: tuple[Layout, Layout], is_first_order: bool) -> Work:
    """Return the size of each array; only second order needs the last four."""
    support = layouts[0]
    examples = max(layout.examples for layout in layouts)
    widest = int(max(support.dense[:, INPUTS].max(), support.dense[:, OUTPUTS].max()))
    z_part = max((int((row[ROWS] + 1) // 2 * row[FILTERS]) for row in support.blocks[1:]), default=0)
    second = 0 if is_first_order else 1
    return Work(
        columns=max(layout.columns for layout in layouts),
        sums=2 * support.largest_weight,
        features=examples * int(support.dense[0, INPUTS]) if len(support.blocks) else 0,
        delta=max(layout.largest_pooled for layout in layouts),
        u_dot=second * support.largest_u,
        part=second * max(2 * support.examples * widest, z_part),
        prediction_dot=second * support.examples * widest,
        delta_dot=second * support.examples * widest,
    )
