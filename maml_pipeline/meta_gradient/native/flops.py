"""The floating-point operations of a meta-gradient: those of its matrix products, by instruction."""

from maml_pipeline.meta_gradient.native.layout import (
    CHANNELS,
    FILTERS,
    INPUTS,
    KERNEL,
    OUTPUTS,
    PIXELS,
    Layout,
)
from maml_pipeline.meta_gradient.native.schedule import CURVATURE, QUERY, RECORD, Schedule

FORWARD, BY_WEIGHTS, BY_INPUT = range(3)
"""The products of a layer, each of 2 x examples x inputs x outputs operations."""


def flops(layouts: tuple[Layout, Layout], schedule: Schedule) -> int:
    """Count the operations of one task.

    Args:
        layouts: Layouts of the support and the query set.
        schedule: The instructions.
    """
    total = 0
    for instruction in schedule.instructions:
        layout = layouts[1] if instruction.operation == QUERY else layouts[0]
        for layer, operations in enumerate(operations_of_layers(layout)):
            # A layer's tangents have two terms for each product, but the images have no tangent.
            terms = 2 if instruction.operation == CURVATURE and layer > 0 else 1
            products = [FORWARD, BY_WEIGHTS] if layer == 0 else [FORWARD, BY_WEIGHTS, BY_INPUT]
            if instruction.operation == RECORD:
                products.remove(BY_WEIGHTS)
            total += terms * len(products) * operations
    return total


def operations_of_layers(layout: Layout) -> list[int]:
    """Count the operations of a product of each layer."""
    blocks, dense = layout.blocks, layout.dense
    inputs = blocks[:, KERNEL] ** 2 * blocks[:, CHANNELS]
    of_blocks = 2 * blocks[:, PIXELS] * blocks[:, FILTERS] * inputs
    return [*map(int, of_blocks), *map(int, 2 * layout.examples * dense[:, INPUTS] * dense[:, OUTPUTS])]
