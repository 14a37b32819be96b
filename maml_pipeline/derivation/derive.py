"""The meta-gradient of one linear unit on one task, traced step by step and computed three ways."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.derivation.rounding import RoundingError
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient, quadratic
from maml_pipeline.meta_gradient.learn2learn_engine import clone_for_task
from maml_pipeline.tasks import Task, TaskBatch


@dataclass(frozen=True)
class InnerStep:
    """One inner step, theta_{t+1} = theta_t - alpha * support gradient.

    `theta`, `support_gradient` and `fast_weights` (theta_{t+1}) are `(D + 1,)`, weights first and
    then the bias. `requires_grad` and `is_leaf` are those of the support gradient: what
    `create_graph` decides.
    """

    theta: Tensor
    support_loss: Tensor
    support_gradient: Tensor
    requires_grad: bool
    is_leaf: bool
    fast_weights: Tensor


@dataclass(frozen=True)
class Derivation:
    """Everything that happens on the way to one meta-gradient; vectors are `(D + 1,)`.

    `query_gradient` is the query loss's gradient at the fast weights and `jacobian`
    `(D + 1, D + 1)` their derivative with respect to theta: the identity for first order, which
    leaves it out. Their product is `closed_form`. The two tolerances `(D + 1,)` are what rounding
    may put between autograd and either other way.
    """

    theta: Tensor
    task: Task
    inner: InnerLoop
    outer_lr: float
    inner_steps: tuple[InnerStep, ...]
    query_loss: Tensor
    query_gradient: Tensor
    jacobian: Tensor
    autograd: Tensor
    closed_form: Tensor
    finite_difference: Tensor
    closed_form_tolerance: Tensor
    finite_difference_tolerance: Tensor

    @property
    def fast_weights(self) -> Tensor:
        """The parameters after all inner steps."""
        return self.inner_steps[-1].fast_weights if self.inner_steps else self.theta

    @property
    def updated(self) -> Tensor:
        """The initial parameters after one step of gradient descent on the query loss."""
        return self.theta - self.outer_lr * self.autograd

    def disagreements(self) -> list[str]:
        """Say, a line each, where autograd differs from another way by more than rounding."""
        lines = []
        for way, other, tolerance in (
            ("the closed form", self.closed_form, self.closed_form_tolerance),
            ("finite differences", self.finite_difference, self.finite_difference_tolerance),
        ):
            gap = (self.autograd.double() - other.double()).abs()
            for name, distance, allowed in zip(names(len(gap) - 1), gap, tolerance, strict=True):
                # Not `distance > allowed`: a gap that is not a number is no agreement.
                if not distance <= allowed:
                    lines.append(
                        f"autograd and {way} differ by {distance:.2g} in {name}; "
                        f"rounding explains {allowed:.2g}"
                    )
        return lines


def derive(theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float) -> Derivation:
    """Trace one task's inner loop and compute its meta-gradient by three independent ways.

    Autograd goes through learn2learn's MAML in theta's dtype. The closed form is the chain rule in
    the same dtype. Finite differences are central, in float64 whatever the dtype, of what the
    gradient order differentiates: the query loss as a function of the fast weights (first order)
    or of the initial parameters (second order).

    Args:
        theta: Weights and then the bias of a linear unit: `(D + 1,)`, float32 or float64.
        task: One task with inputs `(S, D)`, `(Q, D)` and targets `(S, 1)`, `(Q, 1)`, in the same dtype.
        inner: Inner learning rate, steps and gradient order; the loss is the mean squared error.
        outer_lr: Outer learning rate, for the updated parameters.

    Returns:
        The derivation, all of it finite and detached.

    Raises:
        UserError: A number leaves the dtype's range.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, equation 1; first order: section 5.2.
    """
    inner_steps = _trace(theta, task, inner, outer_lr)
    fast_weights = inner_steps[-1].fast_weights if inner_steps else theta
    by_autograd = _query(theta, task, inner)

    identity = torch.eye(len(theta), dtype=theta.dtype)
    H_s, _ = quadratic(task.support_x, task.support_y)
    jacobian = torch.linalg.matrix_power(identity - inner.lr * H_s, inner.steps)
    query_gradient = linear_meta_gradient(theta, task, _first_order(inner))
    numbers: dict[str, Tensor] = {
        "query loss": by_autograd[0],
        "meta-gradient": by_autograd[1],
        "updated parameters": theta - outer_lr * by_autograd[1],
        "derivative of the fast weights": identity if inner.first_order else jacobian,
    }
    for name, value in numbers.items():
        _check_finite(name, value, inner, outer_lr)

    by_difference, difference_error = _finite_difference(theta, task, inner, outer_lr)
    error = RoundingError(task, inner, theta.dtype).of_gradient(
        [step.theta for step in inner_steps] + [fast_weights], query_gradient
    )
    return Derivation(
        theta=theta,
        task=task,
        inner=inner,
        outer_lr=outer_lr,
        inner_steps=inner_steps,
        query_loss=by_autograd[0],
        query_gradient=query_gradient,
        jacobian=identity if inner.first_order else jacobian,
        autograd=by_autograd[1],
        closed_form=linear_meta_gradient(theta, task, inner),
        finite_difference=by_difference,
        # Each of the two ways may be off by its own error.
        closed_form_tolerance=(2 * error).expand(len(theta)),
        finite_difference_tolerance=error + difference_error,
    )


def names(inputs: int, step: str = "") -> list[str]:
    """Name the parameters of a linear unit: w and b, or w[0], w[1], ... and b for several inputs.

    Args:
        inputs: Number of inputs D.
        step: What to put behind the letter: "0" for w0.
    """
    weights = [f"w{step}"] if inputs == 1 else [f"w{step}[{i}]" for i in range(inputs)]
    return [*weights, f"b{step}"]


def _unit(theta: Tensor) -> nn.Linear:
    # Made on the meta device: the usual initialisation would draw from the global random state.
    unit = nn.Linear(len(theta) - 1, 1, device="meta")
    unit.weight = nn.Parameter(theta[None, :-1].clone())
    unit.bias = nn.Parameter(theta[-1:].clone())
    return unit


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _first_order(inner: InnerLoop, steps: int | None = None) -> InnerLoop:
    return InnerLoop(inner.lr, inner.steps if steps is None else steps, first_order=True)


def _trace(theta: Tensor, task: Task, inner: InnerLoop, outer_lr: float) -> tuple[InnerStep, ...]:
    learner = clone_for_task(_unit(theta), inner)
    steps = []
    for t in range(inner.steps):
        before = list(learner.module.parameters())
        loss = mse_loss(learner(task.support_x), task.support_y)
        # What `adapt` computes and keeps to itself. `retain_graph` lets it do so once more.
        gradient = torch.autograd.grad(
            loss, before, retain_graph=True, create_graph=not inner.first_order
        )
        learner.adapt(loss)
        steps.append(
            InnerStep(
                theta=_flat(before),
                support_loss=loss.detach(),
                support_gradient=_flat(gradient),
                requires_grad=all(g.requires_grad for g in gradient),
                is_leaf=all(g.is_leaf for g in gradient),
                fast_weights=_flat(list(learner.module.parameters())),
            )
        )
        at = f"at inner step {t + 1}"
        _check_finite(f"support gradient {at}", steps[-1].support_gradient, inner, outer_lr)
        _check_finite(f"vector of fast weights {at}", steps[-1].fast_weights, inner, outer_lr)
    return tuple(steps)


def _query(theta: Tensor, task: Task, inner: InnerLoop) -> tuple[Tensor, Tensor]:
    """Return learn2learn's query loss and meta-gradient `(D + 1,)`."""
    result = Learn2LearnEngine().meta_gradient(_unit(theta), mse_loss, TaskBatch.stack([task]), inner)
    return result.loss, _flat([result.gradient["weight"], result.gradient["bias"]])


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
        # The query loss is quadratic in the parameters: a central difference is exact for any step,
        # so that it may be as wide as the parameter is large, and rounding is all that is left.
        h = centre.abs().clamp(min=1)
        offset = torch.zeros_like(theta)
        offset[i] = h
        above, below = (_query(thetas[0] + s * offset, task, _first_order(inner))[0] for s in (1, -1))
        differences.append((above - below) / (2 * h))
        errors.append(rounding.of_difference(thetas, h, (above, below)))
    difference = torch.stack(differences)
    _check_finite("finite difference", difference, inner, outer_lr)
    return difference, torch.stack(errors)


def _check_finite(name: str, value: Tensor, inner: InnerLoop, outer_lr: float) -> None:
    if not value.isfinite().all():
        first = value[~value.isfinite()].flatten()[0].item()
        dtype = str(value.dtype).removeprefix("torch.")
        wider = " or take dtype float64" if dtype == "float32" else ""
        raise UserError(
            f"the {name} is {first} in {dtype}, with inner_lr {inner.lr:g}, inner_steps "
            f"{inner.steps} and outer_lr {outer_lr:g}: make them or the parameters smaller{wider}"
        )
