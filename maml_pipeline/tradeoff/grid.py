"""The grid of a trade-off: each gradient order with each number of inner steps and each seed.

The grid may vary further settings, such as the inner learning rate.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder, Method
from maml_pipeline.limits import MAX_INNER_STEPS, MAX_SEED
from maml_pipeline.varied import folder_suffix

SET_BY_TRADEOFF = {
    "model.first_order": "orders",
    "model.differentiated_steps": "orders",
    "model.method": "orders",
    "model.inner_steps": "inner_steps",
    "seed_everything": "seeds",
    "run.dir": "out",
}
"""Config keys that differ between the cells, each with the argument of the trade-off that sets it."""


ORDER_NAMES = ("first", "truncated-N", "second", "checkpointed", "hessian-free")
"""What a trade-off can be asked for, with N inner steps that are differentiated."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        order: The gradient order, and how it is computed.
        inner_steps: Number of inner steps k during training.
        seed: Seed for the initial parameters and the training tasks.
        varied: The values of the varied keys, by config key.
    """

    order: GradientOrder
    inner_steps: int
    seed: int
    varied: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.order}-k{self.inner_steps}{folder_suffix(self.varied)}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish the cell, by config key."""
        return {
            "seed_everything": self.seed,
            "model.inner_steps": self.inner_steps,
            "model.first_order": self.order.first_order,
            "model.differentiated_steps": self.order.differentiated_steps,
            "model.method": str(self.order.method),
            **{key: _as_argument(value) for key, value in self.varied.items()},
        }

    @property
    def relative_cost(self) -> int:
        """Approximate time of a meta-step, in passes over the network; for estimating the time left.

        The query set and each inner step take one pass. Differentiating through an inner step takes two
        more, or three if it is recomputed from a checkpoint.
        """
        n = 0 if self.order.first_order else self.order.differentiated_steps
        differentiated = self.inner_steps if n is None else n
        return 1 + self.inner_steps + differentiated * (2 if self.order.method is Method.UNROLLED else 3)


def make_grid(
    orders: Sequence[str],
    inner_steps: Sequence[int],
    seeds: Sequence[int],
    varied: Sequence[Mapping[str, Any]] = ({},),
) -> list[Cell]:
    """Build the cells, ordered by seed, so that the first seed gives a whole comparison early.

    Args:
        orders: Names of gradient orders, such as `first`, `truncated-2` or `checkpointed`.
        inner_steps: Numbers of inner steps, 0 or more.
        seeds: Seeds, 0 or more.
        varied: Values of the varied keys, by config key; one cell is made for each.

    Raises:
        UserError: A value is invalid or repeated.
    """
    parsed = [_parsed(order) for order in orders]
    for name, values in (("orders", orders), ("inner_steps", inner_steps), ("seeds", seeds)):
        repeated = [value for value in values if [*values].count(value) > 1]
        if repeated:
            raise UserError(f"{name} has {repeated[0]} more than once; list each value once")
    for name, numbers, most in (
        ("inner_steps", inner_steps, MAX_INNER_STEPS),
        ("seeds", seeds, MAX_SEED),
    ):
        if (negative := min(numbers)) < 0:
            raise UserError(f"{name} has {negative}; each must be 0 or more")
        if (largest := max(numbers)) > most:
            raise UserError(f"{name} has {largest}; each must be at most {most}")
    for order in parsed:
        if (n := order.differentiated_steps) is not None and n > (fewest := min(inner_steps)):
            raise UserError(
                f"orders has {order}, which differentiates {n} inner steps, but inner_steps has "
                f"{fewest}; leave one of them out"
            )
    return [
        Cell(order, k, seed, setting)
        for seed, k, order, setting in product(seeds, inner_steps, parsed, varied)
    ]


def _parsed(name: str) -> GradientOrder:
    try:
        return GradientOrder.parse(name)
    except ValueError:
        raise UserError(
            f"orders contains {name or 'an empty value'}; choose from {', '.join(ORDER_NAMES)}"
        ) from None


def _as_argument(value: Any) -> str:
    """Return a value as an argument of `maml fit`."""
    return value if isinstance(value, str) else json.dumps(value)
