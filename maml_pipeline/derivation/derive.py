"""Compute the meta-gradient of one linear unit on one task by three independent methods."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.derivation.result import Derivation, InnerStep
from maml_pipeline.derivation.rounding import RoundingError
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient, quadratic
from maml_pipeline.meta_gradient.learn2learn_engine import clone_for_task
from maml_pipeline.tasks import Task, TaskBatch


def derive(theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float) -> Derivation:
    """Trace one task's inner loop and compute its meta-gradient by three methods.

    - Autograd: through learn2learn's MAML, in theta's dtype.
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
    inner_steps = _trace(theta, task, inner, outer_lr)
    fast_weights = inner_steps[-1].fast_weights if inner_steps else theta
    query_loss, meta_gradient = _autograd(theta, task, inner)

    identity = torch.eye(len(theta), dtype=theta.dtype)
    H_s, _ = quadratic(task.support_x, task.support_y)
    jacobian = torch.linalg.matrix_power(identity - inner.lr * H_s, inner.steps)
    query_gradient = linear_meta_gradient(theta, task, _first_order(inner))
    values: dict[str, Tensor] = {
        "query loss": query_loss,
        "meta-gradient": meta_gradient,
        "updated parameters": theta - outer_lr * meta_gradient,
        "derivative of the fast weights": identity if inner.first_order else jacobian,
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
        query_loss=query_loss,
        query_gradient=query_gradient,
        jacobian=identity if inner.first_order else jacobian,
        autograd=meta_gradient,
        closed_form=linear_meta_gradient(theta, task, inner),
        finite_difference=difference,
        # Both of the compared values carry a rounding error.
        closed_form_tolerance=(2 * error).expand(len(theta)),
        finite_difference_tolerance=error + difference_error,
    )


def _trace(theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float) -> tuple[InnerStep, ...]:
    """Record each inner step of learn2learn's MAML."""
    learner = clone_for_task(_linear_unit(theta), inner)
    steps = []
    for t in range(inner.steps):
        before = list(learner.module.parameters())
        loss = mse_loss(learner(task.support_x), task.support_y)
        # `adapt` computes the same gradient but does not return it; `retain_graph` lets it do so.
        gradient = torch.autograd.grad(
            loss, before, retain_graph=True, create_graph=not inner.first_order
        )
        learner.adapt(loss)
        steps.append(
            InnerStep(
                theta=_flatten(before),
                support_loss=loss.detach(),
                support_gradient=_flatten(gradient),
                requires_grad=all(g.requires_grad for g in gradient),
                is_leaf=all(g.is_leaf for g in gradient),
                fast_weights=_flatten(list(learner.module.parameters())),
            )
        )
        at = f"at inner step {t + 1}"
        _check_finite(f"support gradient {at}", steps[-1].support_gradient, inner, outer_lr)
        _check_finite(f"vector of fast weights {at}", steps[-1].fast_weights, inner, outer_lr)
    return tuple(steps)


def _autograd(theta: Tensor, task: Task, inner: InnerLoop) -> tuple[Tensor, Tensor]:
    """Return learn2learn's query loss, a scalar, and meta-gradient `(D + 1,)`."""
    result = Learn2LearnEngine().meta_gradient(
        _linear_unit(theta), mse_loss, TaskBatch.stack([task]), inner
    )
    return result.loss, _flatten([result.gradient["weight"], result.gradient["bias"]])


def _finite_difference(
    theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float
) -> tuple[Tensor, Tensor]:
    """Return the central differences and a bound of their rounding error, both `(D + 1,)`."""
    theta, task = theta.double(), Task(*(tensor.double() for tensor in task))
    steps = _trace(theta, task, _first_order(inner), outer_lr)
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
        above, below = (_autograd(thetas[0] + s * offset, task, _first_order(inner))[0] for s in (1, -1))
        differences.append((above - below) / (2 * h))
        errors.append(rounding.difference_bound(thetas, h, (above, below)))
    difference = torch.stack(differences)
    _check_finite("finite difference", difference, inner, outer_lr)
    return difference, torch.stack(errors)


def _linear_unit(theta: Tensor) -> nn.Linear:
    # On the meta device, because the usual initialisation draws from the global random state.
    unit = nn.Linear(len(theta) - 1, 1, device="meta")
    unit.weight = nn.Parameter(theta[None, :-1].clone())
    unit.bias = nn.Parameter(theta[-1:].clone())
    return unit


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
