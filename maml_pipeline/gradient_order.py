"""The gradient order, and the method that computes it."""

from enum import StrEnum


class GradientOrder(StrEnum):
    """Whether the meta-gradient flows through the inner updates.

    References:
        Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017: section 5.2 for the first-order approximation.
    """

    FIRST = "first"
    SECOND = "second"


class Method(StrEnum):
    """How a meta-gradient is computed: first order, or second order with one of two methods.

    The values are the methods' names in `maml tradeoff --orders`, in logs, and in the folder names of a
    trade-off's cells. A run's own folder is named after its order. `methods.py` documents the costs.

    Both enumerations are text, so `Method.UNROLLED == GradientOrder.SECOND` holds while CHECKPOINTED
    differs from it: to ask for second order, compare `method.order`.
    """

    FIRST_ORDER = "first"
    UNROLLED = "second"
    """Second order through the graph of the whole inner loop, which is kept in memory."""
    CHECKPOINTED = "checkpointed"
    """Second order with recomputed inner steps: the same gradient with less memory and more time."""

    @classmethod
    def of(cls, first_order: bool, checkpointed: bool) -> "Method":
        """Return the method that two flags select; first order ignores `checkpointed`."""
        if first_order:
            return cls.FIRST_ORDER
        return cls.CHECKPOINTED if checkpointed else cls.UNROLLED

    @property
    def order(self) -> GradientOrder:
        """The gradient order that this method computes."""
        return GradientOrder.FIRST if self is Method.FIRST_ORDER else GradientOrder.SECOND
