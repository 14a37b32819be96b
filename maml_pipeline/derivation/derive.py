"""Compute the meta-gradient of one linear unit on one task by three independent methods."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss

from maml_pipeline.derivation.result import Derivation, InnerStep
from maml_pipeline.derivation.rounding import RoundingError
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient, quadratic
from maml_pipeline.tasks import Task


class Unit(NamedTuple):
    """The parameters of a linear unit, or a gradient with respect to them."""

    weight: Tensor
    bias: Tensor


def derive(theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float) -> Derivation:
    """Trace one task's inner loop and compute its meta-gradient by three methods.

    - Autograd: PyTorch's, through the inner steps, in theta's dtype.
    - Closed form: the chain rule by hand, in theta's dtype.
    - Finite differences: central differences in float64 of the function that the gradient order
      differentiates, which is the query loss as a function of the fast weights (first order) or of
      the initial parameters (second order).

    Args:
        theta: Weights, then the bias of a linear unit: `(D + 1,)`, float32 or float64.
        task: One task with inputs `(S, D)`, `(Q, D)` and targets `(S, 1)`, `(Q, 1)`, in theta's dtype.
        inner: Inner learning rate, steps and gradient order; the loss is the mean squared error.
        outer_lr: Outer learning rate, for the updated parameters.

    Returns:
        The derivation; its tensors are finite and detached.

    Raises:
        UserError: A value overflows the dtype.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1; first order: section 5.2.
    """
    initial, fast, inner_steps = _adapt(theta, task, inner, outer_lr)
    fast_weights = _flatten(fast)
    query_loss = _query_loss(fast, task)
    meta_gradient = _flatten(torch.autograd.grad(query_loss, initial))

    identity = torch.eye(len(theta), dtype=theta.dtype)
    H_s, _ = quadratic(task.support_x, task.support_y)
    jacobian = torch.linalg.matrix_power(identity - inner.lr * H_s, inner.steps)
    query_gradient = linear_meta_gradient(theta, task, _first_order(inner))
    closed_form = linear_meta_gradient(theta, task, inner)
    values: dict[str, Tensor] = {
        "query loss": query_loss.detach(),
        "meta-gradient": meta_gradient,
        "updated parameters": theta - outer_lr * meta_gradient,
        "derivative of the fast weights": identity if inner.first_order else jacobian,
        # Its Hessian may overflow where autograd, which never forms it, does not.
        "closed form of the query gradient": query_gradient,
        "closed form of the meta-gradient": closed_form,
    }
    for name, value in values.items():
        _check_finite(name, value, inner, outer_lr)

    difference, difference_error = _finite_difference(theta, task, inner, outer_lr)
    error = RoundingError(task, inner, theta.dtype).gradient_bound(
        [step.theta for step in inner_steps] + [fast_weights], query_gradient
    )
    return Derivation(
        theta=theta,
        task=task,
        inner=inner,
        outer_lr=outer_lr,
        inner_steps=inner_steps,
        query_loss=query_loss.detach(),
        query_gradient=query_gradient,
        jacobian=identity if inner.first_order else jacobian,
        autograd=meta_gradient,
        closed_form=closed_form,
        finite_difference=difference,
        # Both of the compared values carry a rounding error.
        closed_form_tolerance=(2 * error).expand(len(theta)),
        finite_difference_tolerance=error + difference_error,
    )


def _adapt(
    theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float
) -> tuple[Unit, Unit, tuple[InnerStep, ...]]:
    """Take the inner steps by autograd.

    Returns:
        The initial parameters, the fast weights with their graph, and a record of each inner step.
    """
    initial = Unit(theta[None, :-1].clone().requires_grad_(), theta[-1:].clone().requires_grad_())
    fast, steps = initial, []
    for t in range(inner.steps):
        loss = mse_loss(linear(task.support_x, *fast), task.support_y)
        gradient = Unit(*torch.autograd.grad(loss, fast, create_graph=not inner.first_order))
        before, fast = fast, Unit(*(p - inner.lr * g for p, g in zip(fast, gradient, strict=True)))
        steps.append(
            InnerStep(
                theta=_flatten(before),
                support_loss=loss.detach(),
                support_gradient=_flatten(gradient),
                requires_grad=all(g.requires_grad for g in gradient),
                is_leaf=all(g.is_leaf for g in gradient),
                fast_weights=_flatten(fast),
            )
        )
        at = f"at inner step {t + 1}"
        _check_finite(f"support loss {at}", steps[-1].support_loss, inner, outer_lr)
        _check_finite(f"support gradient {at}", steps[-1].support_gradient, inner, outer_lr)
        _check_finite(f"vector of fast weights {at}", steps[-1].fast_weights, inner, outer_lr)
    return initial, fast, tuple(steps)


def _query_loss(fast: Unit, task: Task) -> Tensor:
    return mse_loss(linear(task.query_x, *fast), task.query_y)


def _finite_difference(
    theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float
) -> tuple[Tensor, Tensor]:
    """Return the central differences and a bound of their rounding error, both `(D + 1,)`."""
    theta, task = theta.double(), Task(*(tensor.double() for tensor in task))
    _, _, steps = _adapt(theta, task, _first_order(inner), outer_lr)
    thetas = [theta, *(step.fast_weights for step in steps)]
    if inner.first_order:
        inner, thetas = _first_order(inner, steps=0), thetas[-1:]
    rounding = RoundingError(task, inner, torch.float64)

    differences, errors = [], []
    for i, centre in enumerate(thetas[0]):
        # The query loss is quadratic in the parameters, so a central difference is exact for any
        # step h but for rounding, which is smallest for a large h.
        h = centre.abs().clamp(min=1)
        offset = torch.zeros_like(theta)
        offset[i] = h
        above, below = (
            _query_loss(_adapt(thetas[0] + sign * offset, task, _first_order(inner), outer_lr)[1], task)
            for sign in (1, -1)
        )
        differences.append((above - below) / (2 * h))
        errors.append(rounding.difference_bound(thetas, h, (above, below)))
    difference = torch.stack(differences)
    _check_finite("finite difference", difference, inner, outer_lr)
    return difference, torch.stack(errors)


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _first_order(inner: InnerLoop, steps: int | None = None) -> InnerLoop:
    return InnerLoop(inner.lr, inner.steps if steps is None else steps, first_order=True)


def _check_finite(name: str, value: Tensor, inner: InnerLoop, outer_lr: float) -> None:
    if not value.isfinite().all():
        first = value[~value.isfinite()].flatten()[0].item()
        dtype = str(value.dtype).removeprefix("torch.")
        wider = ", or set dtype to float64" if dtype == "float32" else ""
        raise UserError(
            f"the {name} is {first} in {dtype}, with inner_lr {inner.lr:g}, inner_steps "
            f"{inner.steps} and outer_lr {outer_lr:g}; make them or the parameters smaller{wider}"
        )
