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
    """How a meta-gradient is computed: first order, or second order by one of two methods.

    A value is the method's name in flags, in the names of runs and in logs.
    """

    FIRST_ORDER = "first"
    UNROLLED = "second"
    """Second order through the whole unrolled inner loop, kept in memory."""
    CHECKPOINTED = "checkpointed"
    """Second order with checkpointed inner steps: the same gradient for less memory and more time."""

    @classmethod
    def of(cls, first_order: bool, checkpointed: bool) -> "Method":
        """Return the method that two flags choose; first order has no inner steps to checkpoint."""
        if first_order:
            return cls.FIRST_ORDER
        return cls.CHECKPOINTED if checkpointed else cls.UNROLLED

    @property
    def order(self) -> GradientOrder:
        """The gradient order that this method computes."""
        return GradientOrder.FIRST if self is Method.FIRST_ORDER else GradientOrder.SECOND
