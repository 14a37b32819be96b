"""The grid of a trade-off: every gradient order with every number of inner steps and every seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.limits import MAX_INNER_STEPS, MAX_SEED
from maml_pipeline.meta_gradient.order import Method


@dataclass(frozen=True)
class Cell:
    """One training of the grid.

    Args:
        method: How the meta-gradient is computed.
        inner_steps: Inner steps k while training.
        seed: Of the initial parameters and of the training tasks.
    """

    method: Method
    inner_steps: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.method}-k{self.inner_steps}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What sets it apart, by key of the configuration."""
        return {
            "seed_everything": self.seed,
            "model.inner_steps": self.inner_steps,
            "model.first_order": self.method is Method.FIRST_ORDER,
            "model.checkpoint_inner_steps": self.method is Method.CHECKPOINTED,
        }

    @property
    def weight(self) -> int:
        """About how long a meta-step takes, for the time that is left: passes over the network.

        Every inner step and the query set take one; second order goes back over each inner step,
        and checkpointed recomputes it before.
        """
        back = {Method.FIRST_ORDER: 0, Method.UNROLLED: 2, Method.CHECKPOINTED: 3}[self.method]
        return 1 + self.inner_steps * (1 + back)


def make_grid(orders: Sequence[str], inner_steps: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    """Build the cells: seed by seed, so that a whole comparison is there as early as can be.

    Raises:
        UserError: A value is none, or is there twice.
    """
    if wrong := [order for order in orders if order not in [*Method]]:
        raise UserError(
            f"orders has {wrong[0] or 'an empty one'}; an order is one of {', '.join(Method)}"
        )
    for name, values in (("orders", orders), ("inner_steps", inner_steps), ("seeds", seeds)):
        repeated = [value for value in values if [*values].count(value) > 1]
        if repeated:
            raise UserError(f"{name} has {repeated[0]} more than once; name each once")
    for name, numbers, most in (
        ("inner_steps", inner_steps, MAX_INNER_STEPS),
        ("seeds", seeds, MAX_SEED),
    ):
        if (negative := min(numbers)) < 0:
            raise UserError(f"{name} has {negative}; each must be 0 or more")
        if (largest := max(numbers)) > most:
            raise UserError(f"{name} has {largest}; each must be at most {most}")
    return [Cell(Method(order), k, seed) for seed, k, order in product(seeds, inner_steps, orders)]
