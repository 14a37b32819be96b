"""The grid of a trade-off: each order or method with each number of inner steps and each seed.

The grid may vary further settings, such as the inner learning rate.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.limits import MAX_INNER_STEPS, MAX_SEED
from maml_pipeline.varied import folder_suffix

SET_BY_TRADEOFF = {
    "model.first_order": "orders",
    "model.checkpoint_inner_steps": "orders",
    "model.inner_steps": "inner_steps",
    "seed_everything": "seeds",
    "run.dir": "out",
}
"""Config keys that differ between the cells, each with the argument of the trade-off that sets it."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Args:
        method: How the meta-gradient is computed.
        inner_steps: Number of inner steps k during training.
        seed: Seed for the initial parameters and the training tasks.
        varied: The values of the varied keys, by config key.
    """

    method: Method
    inner_steps: int
    seed: int
    varied: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The name of the cell's folder."""
        return f"{self.method}-k{self.inner_steps}{folder_suffix(self.varied)}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish the cell, by config key."""
        return {
            "seed_everything": self.seed,
            "model.inner_steps": self.inner_steps,
            "model.first_order": self.method is Method.FIRST_ORDER,
            "model.checkpoint_inner_steps": self.method is Method.CHECKPOINTED,
            **{key: _as_argument(value) for key, value in self.varied.items()},
        }

    @property
    def relative_cost(self) -> int:
        """Approximate time of a meta-step, in passes over the network; for estimating the time left.

        The query set and each inner step take one pass. Second order differentiates through each inner
        step, which takes two more, or three if it recomputes the step from a checkpoint.
        """
        extra = {Method.FIRST_ORDER: 0, Method.UNROLLED: 2, Method.CHECKPOINTED: 3}[self.method]
        return 1 + self.inner_steps * (1 + extra)


def make_grid(
    orders: Sequence[str],
    inner_steps: Sequence[int],
    seeds: Sequence[int],
    varied: Sequence[Mapping[str, Any]] = ({},),
) -> list[Cell]:
    """Build the cells, ordered by seed, so that the first seed gives a whole comparison early.

    Args:
        orders: Names of methods: `first`, `second` or `checkpointed`.
        inner_steps: Numbers of inner steps, 0 or more.
        seeds: Seeds, 0 or more.
        varied: Values of the varied keys, by config key; one cell is made for each.

    Raises:
        UserError: A value is invalid or repeated.
    """
    if wrong := [order for order in orders if order not in [*Method]]:
        raise UserError(
            f"orders contains {wrong[0] or 'an empty value'}; choose from {', '.join(Method)}"
        )
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
    return [
        Cell(Method(order), k, seed, setting)
        for seed, k, order, setting in product(seeds, inner_steps, orders, varied)
    ]


def _as_argument(value: Any) -> str:
    """Return a value as an argument of `maml fit`."""
    return value if isinstance(value, str) else json.dumps(value)
