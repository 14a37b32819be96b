"""The inner loop: how a network adapts to one task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder, Method
from maml_pipeline.limits import check_positive, check_whole

Loss = Callable[[Tensor, Tensor], Tensor]
"""(prediction, target) -> scalar."""

Parameters = dict[str, Tensor]
"""Trainable parameters by name."""

Rates = Mapping[str, Tensor]
"""Inner learning rates `(n,)` by parameter name."""

MAX_LISTED = 8
"""Parameter names that an error lists."""


@dataclass(frozen=True)
class InnerLoop:
    """Gradient descent on the support loss: theta_{t+1} = theta_t - alpha * grad L_support(theta_t).

    Args:
        lr: Inner learning rate alpha, above 0.
        steps: Number of inner steps k, at least 0.
        first_order: Treat the support gradients as constants (FOMAML) instead of differentiating
            through them (MAML).
        differentiated_steps: Differentiate through the last n inner steps alone, 0 to k (truncated
            second order); `None` for all. 0 is first order, and k second order, bit for bit.
        method: How second order is computed: `"unrolled"`, `"checkpointed"` or `"hessian_free"`.
        adapt: Patterns of the names of the parameters that the inner steps move, such as `("head.*",)`;
            `None` for all. See `adapted_names`.
        rates: Learned inner learning rates `(n,)` of each adapted parameter, by its name, one for each
            inner step; later steps take the last one. `None` for `lr`.

    Raises:
        UserError: A setting is out of range, or contradicts another.
    """

    lr: float
    steps: int = 1
    first_order: bool = False
    differentiated_steps: int | None = None
    method: Method | Literal["unrolled", "checkpointed", "hessian_free"] = Method.UNROLLED
    adapt: Sequence[str] | None = None
    rates: Rates | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("inner_lr", self.lr)
        check_whole("inner_steps", self.steps, 0)
        if self.adapt is not None:
            object.__setattr__(self, "adapt", _checked_patterns(self.adapt))
        if self.method not in [*Method]:
            raise UserError(f"method is {self.method}; it must be {', '.join(Method)}")
        object.__setattr__(self, "method", Method(self.method))
        if self.differentiated_steps is not None:
            check_whole("differentiated_steps", self.differentiated_steps, 0)
            if self.differentiated_steps > self.steps:
                raise UserError(
                    f"differentiated_steps is {self.differentiated_steps}, but there are {self.steps} "
                    "inner_steps; give at most as many, or null for all"
                )
        self._check_first_order()

    def _check_first_order(self) -> None:
        if self.first_order and self.differentiated_steps is not None:
            raise UserError(
                f"differentiated_steps is {self.differentiated_steps}, but first_order is true, which "
                "differentiates no inner step; set first_order to false, or leave it out"
            )
        if self.first_order and self.method is not Method.UNROLLED:
            raise UserError(
                f"method is {self.method}, but first_order is true, and only second order has a method; "
                "set first_order to false, or leave it out"
            )

    @property
    def first_differentiated_step(self) -> int:
        """The first inner step t that the meta-gradient differentiates through; k if there is none.

        The steps before it are taken as in first order: theta_t is a constant plus theta_0 to the
        meta-gradient.
        """
        if self.first_order:
            return self.steps
        return 0 if self.differentiated_steps is None else self.steps - self.differentiated_steps

    @property
    def is_first_order(self) -> bool:
        """Whether no inner step is differentiated: the meta-gradient is the query gradient alone."""
        return self.first_differentiated_step == self.steps

    @property
    def needs_second_derivatives(self) -> bool:
        """Whether the meta-gradient takes derivatives of gradients."""
        return not self.is_first_order and self.method is not Method.HESSIAN_FREE

    @property
    def order(self) -> GradientOrder:
        """The gradient order with its method, as trade-offs and reports name it."""
        return GradientOrder(self.first_order, self.differentiated_steps, Method(self.method))

    def rate(self, t: int, name: str) -> float | Tensor:
        """Return the inner learning rate of a parameter in inner step t."""
        if self.rates is None:
            return self.lr
        rates = self.rates[name]
        return rates[min(t, len(rates) - 1)]

    def with_differentiable_rates(self) -> "InnerLoop":
        """Return the same inner loop with rates that are leaves of a new graph."""
        if self.rates is None:
            return self
        return replace(self, rates={name: r.detach().requires_grad_() for name, r in self.rates.items()})

    def in_first_order(self) -> "InnerLoop":
        """Return the same steps with the first-order meta-gradient, for which no graph is kept."""
        return replace(self, first_order=True, differentiated_steps=None, method=Method.UNROLLED)

    def in_second_order(self, method: Method = Method.UNROLLED) -> "InnerLoop":
        """Return the same steps with the second-order meta-gradient of all steps."""
        return replace(self, first_order=False, differentiated_steps=None, method=method)


def trainable_parameters(network: nn.Module) -> Parameters:
    """Return the parameters that require a gradient, by name; a shared parameter appears once."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def adapted_names(network: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the parameters that the inner steps move.

    The others are fixed in the inner loop. All trainable parameters are meta-learned, adapted or not.

    Args:
        network: Its trainable parameters are matched; a shared one by any of its names.
        patterns: As in `fnmatch`: `head.*` matches `head.weight`, `*.bias` every bias. `None` for all.

    Returns:
        Names in the order of `trainable_parameters`.

    Raises:
        UserError: A pattern matches no trainable parameter.

    References:
        Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the
        Effectiveness of MAML", 2020 (ANIL: the head alone); Oh, Yoo, Kim, Yun, "BOIL: Towards
        Representation Change for Few-shot Learning", 2021 (the body alone).
    """
    trainable = trainable_parameters(network)
    if patterns is None:
        return tuple(trainable)
    matched: set[int] = set()
    every = {n: id(p) for n, p in network.named_parameters(remove_duplicate=False) if p.requires_grad}
    for pattern in patterns:
        found = {parameter for name, parameter in every.items() if fnmatchcase(name, pattern)}
        if not found:
            some = ", ".join([*trainable][:MAX_LISTED]) + (
                ", ..." if len(trainable) > MAX_LISTED else ""
            )
            raise UserError(
                f"adapt has {pattern}, which matches no trainable parameter of network "
                f"{type(network).__name__}; they are {some}"
            )
        matched |= found
    return tuple(name for name, p in trainable.items() if id(p) in matched)


def _checked_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    is_list = not isinstance(patterns, str) and all(isinstance(pattern, str) for pattern in patterns)
    if not is_list or not patterns:
        raise UserError(
            f"adapt is {patterns!r}; it must be a list of patterns of parameter names, such as "
            "[head.*], or null to adapt all parameters"
        )
    return tuple(patterns)


def check_finite(inner_losses: Tensor, inner_lr: float, when: str) -> None:
    """Raise an error that names the first inner step whose loss is not finite.

    Args:
        inner_losses: `(T, k + 1)`, one column per inner step.
        inner_lr: Inner learning rate, for the message.
        when: Position in training, for the message: "meta-step 12".

    Raises:
        UserError: A loss is NaN or infinite.
    """
    finite = torch.isfinite(inner_losses)
    if finite.all():
        return
    inner_step = int((~finite).any(dim=0).nonzero()[0])
    value = inner_losses[~finite[:, inner_step], inner_step][0].item()
    raise UserError(
        f"the loss is {value} at {when}, inner step {inner_step}, with inner_lr {inner_lr}: "
        "lower inner_lr or the optimizer's learning rate, or look for bad values in the tasks"
    )
