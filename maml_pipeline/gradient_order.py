"""The gradient order: how many inner steps a meta-gradient differentiates, and by which method."""

import re
from dataclasses import dataclass
from enum import StrEnum

FIRST, SECOND = "first", "second"


class Method(StrEnum):
    """How second order is computed; `docs/engines.md` has the costs.

    The values are those of the key `model.method`.
    """

    UNROLLED = "unrolled"
    """Through the graph of the inner steps, which is kept in memory."""
    CHECKPOINTED = "checkpointed"
    """With recomputed inner steps: the same gradient with less memory and more time."""
    HESSIAN_FREE = "hessian_free"
    """With differences of gradients in place of second derivatives: close to the same gradient."""


@dataclass(frozen=True)
class GradientOrder:
    """First order, second order, or a point between them; and the method that computes it.

    `str` gives the name of `maml tradeoff --orders`, of the cells' folders and of W&B's job types:
    `first`, `truncated-2`, `second`, and with another method than `unrolled` `checkpointed`,
    `hessian-free`, `truncated-2-checkpointed`, `truncated-2-hessian-free`.

    Args:
        first_order: Whether no inner step is differentiated.
        differentiated_steps: The number n of last inner steps that are differentiated, 0 or more;
            `None` for all of them.
        method: How their derivatives are computed.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017:
        section 5.2 for first order; Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for
        Bilevel Optimization", 2019, for those between; Fallah, Mokhtari, Ozdaglar, "On the Convergence
        Theory of Gradient-Based Model-Agnostic Meta-Learning Algorithms", 2020, for `hessian_free`.
    """

    first_order: bool = False
    differentiated_steps: int | None = None
    method: Method = Method.UNROLLED

    @classmethod
    def parse(cls, name: str) -> "GradientOrder":
        """Return the order of a name.

        Raises:
            ValueError: No order has this name.
        """
        methods = "|".join(map(_dashed, METHODS_WITH_A_NAME))
        if name in (FIRST, SECOND):
            return cls(first_order=name == FIRST)
        if name in methods.split("|"):
            return cls(method=Method(name.replace("-", "_")))
        if found := re.fullmatch(rf"truncated-(0|[1-9]\d{{0,5}})(?:-({methods}))?", name):
            method = Method(found[2].replace("-", "_")) if found[2] else Method.UNROLLED
            return cls(differentiated_steps=int(found[1]), method=method)
        raise ValueError(name)

    @property
    def degree(self) -> str:
        """What is computed, whichever method does it: `first`, `truncated-2` or `second`."""
        if self.first_order:
            return FIRST
        return SECOND if self.differentiated_steps is None else f"truncated-{self.differentiated_steps}"

    def __str__(self) -> str:
        if self.first_order or self.method is Method.UNROLLED:
            return self.degree
        name = _dashed(self.method)
        return name if self.degree == SECOND else f"{self.degree}-{name}"

    @property
    def label(self) -> str:
        """The order in a table or a legend: `second, checkpointed`."""
        name = self.degree.replace("-", " ")
        is_plain = self.first_order or self.method is Method.UNROLLED
        return name if is_plain else f"{name}, {_dashed(self.method)}"

    @property
    def short_label(self) -> str:
        """The order beside a mark in a plot: as `label`, but `checkpointed` alone for second order."""
        return _dashed(self.method) if self.label.startswith(f"{SECOND}, ") else self.label

    @property
    def phrase(self) -> str:
        """The order in a sentence: `checkpointed second order`."""
        if self.first_order:
            return "first order"
        prefix = {Method.CHECKPOINTED: "checkpointed ", Method.HESSIAN_FREE: "Hessian-free "}
        n = self.differentiated_steps
        steps = "" if n is None else f" truncated to {n} step{'' if n == 1 else 's'}"
        return f"{prefix.get(self.method, '')}second order{steps}"

    @property
    def rank(self) -> tuple[int, float]:
        """What orders are sorted by: from first to second order by method, first order before all."""
        if self.first_order:
            return -1, 0
        steps = self.differentiated_steps
        return [*Method].index(self.method), float("inf") if steps is None else steps


def _dashed(method: Method) -> str:
    return method.replace("_", "-")


METHODS_WITH_A_NAME = (Method.CHECKPOINTED, Method.HESSIAN_FREE)
"""Methods that are part of an order's name; the other is the default."""

DEFAULT_ORDERS = (
    GradientOrder(first_order=True),
    GradientOrder(),
    GradientOrder(method=Method.CHECKPOINTED),
)
"""The orders that a trade-off compares unless it is told which."""
