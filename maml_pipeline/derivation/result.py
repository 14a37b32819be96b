"""What a derivation holds: every number on the way to one meta-gradient, and how the orders compare."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.tasks import Task


@dataclass(frozen=True)
class InnerStep:
    """One inner step, theta_{t+1} = theta_t - alpha * support gradient.

    Vectors are `(D + 1,)`: the weights, then the bias. `requires_grad` and `is_leaf` are those of the
    support gradient, which `create_graph` determines.
    """

    theta: Tensor
    support_loss: Tensor
    support_gradient: Tensor
    requires_grad: bool
    is_leaf: bool
    fast_weights: Tensor


@dataclass(frozen=True)
class Derivation:
    """One meta-gradient, computed by three methods; vectors are `(D + 1,)`.

    Attributes:
        theta: Initial parameters: the weights, then the bias.
        inner_steps: The k inner steps, in order.
        query_gradient: Gradient of the query loss at the fast weights.
        jacobian: `(D + 1, D + 1)`, derivative of the fast weights with respect to theta; the identity
            for first order, which ignores it.
        autograd: Meta-gradient by autograd through the inner steps.
        closed_form: Meta-gradient by the chain rule: jacobian^T query_gradient.
        finite_difference: Meta-gradient by central differences in float64.
        closed_form_tolerance: Largest rounding error between `autograd` and `closed_form`.
        finite_difference_tolerance: The same for `finite_difference`.
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
        """Parameters after all inner steps."""
        return self.inner_steps[-1].fast_weights if self.inner_steps else self.theta

    @property
    def updated(self) -> Tensor:
        """Initial parameters after one outer step of gradient descent on the query loss."""
        return self.theta - self.outer_lr * self.autograd

    def disagreements(self) -> list[str]:
        """Describe each parameter whose gradients differ by more than rounding; empty if none does."""
        lines = []
        for method, other, tolerance in (
            ("the closed form", self.closed_form, self.closed_form_tolerance),
            ("finite differences", self.finite_difference, self.finite_difference_tolerance),
        ):
            gap = (self.autograd.double() - other.double()).abs()
            names = parameter_names(len(gap) - 1)
            for name, distance, allowed in zip(names, gap, tolerance, strict=True):
                # Not `distance > allowed`: a gap of NaN is a disagreement.
                if not distance <= allowed:
                    lines.append(
                        f"autograd and {method} differ by {distance:.2g} in {name}; "
                        f"rounding explains {allowed:.2g}"
                    )
        return lines


def parameter_names(inputs: int, step: str = "") -> list[str]:
    """Name the parameters of a linear unit: w and b, or w[0], w[1], ... and b for several inputs.

    Args:
        inputs: Number of inputs D.
        step: Suffix of the letter, such as "0" for w0.
    """
    weights = [f"w{step}"] if inputs == 1 else [f"w{step}[{i}]" for i in range(inputs)]
    return [*weights, f"b{step}"]


def ratio_and_angle(first: Derivation, second: Derivation) -> tuple[float | None, float | None]:
    """Compare the length and direction of the two orders' meta-gradients.

    Returns:
        ||second|| / ||first||, `None` if the first-order meta-gradient is zero; and the angle between
        them in degrees, `None` if either is zero.
    """
    g1, g2 = first.autograd.double(), second.autograd.double()
    n1, n2 = g1.norm(), g2.norm()
    if n1 == 0:
        return None, None
    ratio = (n2 / n1).item()
    if n2 == 0:
        return ratio, None
    # Kahan's formula: unlike the arc cosine, it is accurate for small angles too.
    a, b = g1 / n1, g2 / n2
    return ratio, math.degrees(2 * math.atan2((a - b).norm(), (a + b).norm()))


def to_json(derivations: Sequence[Derivation]) -> str:
    """Format every number of derivations of one task as one JSON object.

    Args:
        derivations: First order, second order or both, in this sequence.
    """
    result = {
        "first_order" if derivation.inner.first_order else "second_order": _values(derivation)
        for derivation in derivations
    }
    if len(derivations) == 2:
        ratio, angle = ratio_and_angle(*derivations)
        result["second_order"]["against_first_order"] = {"ratio": ratio, "angle_degrees": angle}
    return json.dumps(result, indent=2, allow_nan=False)


def _values(derivation: Derivation) -> dict[str, object]:
    steps = derivation.inner_steps
    no_step = {"w": None, "b": None}
    return {
        "w0": _pair(derivation.theta)["w"],
        "b0": _pair(derivation.theta)["b"],
        "support_grad": _pair(steps[0].support_gradient) if steps else no_step,  # of the first step
        "fast_weights": _pair(derivation.fast_weights),
        "inner_steps": [
            {
                "support_loss": step.support_loss.item(),
                "support_grad": _pair(step.support_gradient),
                "support_grad_requires_grad": step.requires_grad,
                "support_grad_is_leaf": step.is_leaf,
                "fast_weights": _pair(step.fast_weights),
            }
            for step in steps
        ],
        "query_loss": derivation.query_loss.item(),
        "meta_grad": {
            "autograd": _pair(derivation.autograd),
            "closed_form": _pair(derivation.closed_form),
            "finite_difference": _pair(derivation.finite_difference),
        },
        "tolerance": {
            "closed_form": _pair(derivation.closed_form_tolerance),
            "finite_difference": _pair(derivation.finite_difference_tolerance),
        },
        "agree": not derivation.disagreements(),
        "updated": _pair(derivation.updated),
    }


def _pair(theta: Tensor) -> dict[str, object]:
    """Split a vector into w (a number for one input, a list for several) and b."""
    *w, b = theta.tolist()
    return {"w": w[0] if len(w) == 1 else w, "b": b}
