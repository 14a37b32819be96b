"""A derivation as a person reads it, in the order in which it happens."""

import json
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml_pipeline.derivation.derive import Derivation, InnerStep, names
from maml_pipeline.meta_gradient.closed_form import quadratic

WIDTH = 88
TERMS_SHOWN = 6


def as_text(derivations: Sequence[Derivation]) -> str:
    """Write derivations of one task out in full, and how the two orders differ where both are there.

    Args:
        derivations: First order, second order or both, in this sequence.
    """
    lines = list(_problem(derivations[0]))
    for derivation in derivations:
        lines += ["", *_derivation(derivation)]
    if len(derivations) == 2:
        lines += ["", _difference(*derivations)]
    return "\n".join(lines)


def as_json(derivations: Sequence[Derivation]) -> str:
    """Write every figure of derivations of one task as one JSON object.

    Args:
        derivations: First order, second order or both, in this sequence.
    """
    result = {_order(derivation): _figures(derivation) for derivation in derivations}
    if len(derivations) == 2:
        ratio, angle = ratio_and_angle(*derivations)
        result["second_order"]["against_first_order"] = {"ratio": ratio, "angle_degrees": angle}
    return json.dumps(result, indent=2, allow_nan=False)


def ratio_and_angle(first: Derivation, second: Derivation) -> tuple[float | None, float | None]:
    """Compare the second-order meta-gradient's length and direction with the first-order one's.

    Returns:
        The ratio of their norms, and the angle between them in degrees; `None` where the
        meta-gradient that it takes is zero.
    """
    g1, g2 = first.autograd.double(), second.autograd.double()
    n1, n2 = g1.norm(), g2.norm()
    if n1 == 0:
        return None, None
    ratio = (n2 / n1).item()
    if n2 == 0:
        return ratio, None
    # Kahan's formula: unlike the arc cosine, it is exact for small angles too.
    a, b = g1 / n1, g2 / n2
    return ratio, math.degrees(2 * math.atan2((a - b).norm(), (a + b).norm()))


def _order(derivation: Derivation) -> str:
    return "first_order" if derivation.inner.first_order else "second_order"


# JSON ---------------------------------------------------------------------------------------------


def _figures(derivation: Derivation) -> dict[str, object]:
    steps = derivation.inner_steps
    none_taken = {"w": None, "b": None}
    return {
        "w0": _pair(derivation.theta)["w"],
        "b0": _pair(derivation.theta)["b"],
        # Of the first inner step: with more than one, `inner_steps` holds them all.
        "support_grad": _pair(steps[0].support_gradient) if steps else none_taken,
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
    """Split a vector into w, a number for one input and a list for several, and b."""
    *w, b = theta.tolist()
    return {"w": w[0] if len(w) == 1 else w, "b": b}


# Text ---------------------------------------------------------------------------------------------


def _problem(derivation: Derivation) -> Iterator[str]:
    inner, task = derivation.inner, derivation.task
    dtype = str(derivation.theta.dtype).removeprefix("torch.")
    yield "One linear unit, y = w x + b, with the mean squared error L_s on the support set and"
    yield f"L_q on the query set; inner_lr {inner.lr:g}, inner_steps {inner.steps}, {dtype}."
    yield f"  support (x, y): {_points(task.support_x, task.support_y)}"
    yield f"  query (x, y):   {_points(task.query_x, task.query_y)}"


def _points(x: Tensor, y: Tensor) -> str:
    points = [
        f"({', '.join(f'{value:g}' for value in [*inputs, *target])})"
        for inputs, target in zip(x.tolist(), y.tolist(), strict=True)
    ]
    return _abbreviated(points, " ")


def _derivation(derivation: Derivation) -> Iterator[str]:
    inner, k = derivation.inner, derivation.inner.steps
    inputs = len(derivation.theta) - 1
    order, flag = ("First", "False") if inner.first_order else ("Second", "True")
    title = f"{order} order: create_graph={flag} "
    yield title + "=" * (WIDTH - len(title))

    yield "Initial parameters"
    for name, value in zip(names(inputs, "0"), derivation.theta.tolist(), strict=True):
        yield f"  {name} = {value}"
    if k == 0:
        yield "No inner step: the initial parameters meet the query set as they are"
    for t, step in enumerate(derivation.inner_steps):
        yield from _inner_step(step, t, inner.lr, k)

    yield "Query loss"
    yield f"  L_q({', '.join(names(inputs, str(k)))}) = {derivation.query_loss.item()}"
    if k == 0:
        yield "Meta-gradient: dL_q/dw0"
    elif inner.first_order:
        yield f"Meta-gradient: dL_q/dw{k}, stopping at the fast weights"
    else:
        yield "Meta-gradient: dL_q/dw0, through every update"
    yield from _chain_rule(derivation)
    yield from _three_ways(derivation)

    yield "Outer update"
    for name, theta, gradient, updated in zip(
        names(inputs, "0"),
        derivation.theta.tolist(),
        derivation.autograd.tolist(),
        derivation.updated.tolist(),
        strict=True,
    ):
        yield f"  {name}' = {name} - outer_lr * dL_q"
        indent = " " * (len(name) + 4)
        yield f"{indent}= {theta} - {derivation.outer_lr:g} * {_in_sum(gradient)} = {updated}"


def _inner_step(step: InnerStep, t: int, lr: float, k: int) -> Iterator[str]:
    inputs = len(step.theta) - 1
    before, after = names(inputs, str(t)), names(inputs, str(t + 1))
    gradient = step.support_gradient.tolist()
    yield "Support gradient" if k == 1 else f"Inner step {t + 1} of {k}: support gradient"
    for name, value in zip(before, gradient, strict=True):
        yield f"  dL_s/d{name} = {value}"
    meaning = "a node of the graph" if step.requires_grad else "a constant"
    yield f"  requires_grad = {step.requires_grad}, is_leaf = {step.is_leaf}: {meaning}"
    yield "Fast weights" if k == 1 else f"Inner step {t + 1} of {k}: fast weights"
    for new, old, theta, g, value in zip(
        after, before, step.theta.tolist(), gradient, step.fast_weights.tolist(), strict=True
    ):
        yield f"  {new} = {old} - inner_lr * dL_s/d{old} = {theta} - {lr:g} * {_in_sum(g)} = {value}"


def _chain_rule(derivation: Derivation) -> Iterator[str]:
    """Write the closed form with the numbers put in."""
    task, k = derivation.task, derivation.inner.steps
    inputs = len(derivation.theta) - 1
    at_k, at_0 = names(inputs, str(k)), names(inputs, "0")
    residuals = (
        task.query_x @ derivation.fast_weights[:-1, None] + derivation.fast_weights[-1] - task.query_y
    )
    Q = len(residuals)
    factor = "2" if Q == 1 else f"2/{Q}"
    gradient = derivation.query_gradient.tolist()
    yield "  by hand, r = w x + b - y at the query points with the fast weights:"
    for i, (name, value) in enumerate(zip(at_k, gradient, strict=True)):
        x = task.query_x[:, i].tolist() if i < inputs else [1.0] * Q
        products = [f"{r} * {_in_sum(v)}" for r, v in zip(residuals.flatten().tolist(), x, strict=True)]
        total = _abbreviated(products, " + ")
        total = total if Q == 1 else f"({total})"
        rule = "2 r" if Q == 1 else f"2/{Q} sum r"
        rule += f" x[{i}]" if i < inputs and inputs > 1 else " x" if i < inputs else ""
        yield f"    dL_q/d{name} = {rule} = {factor} * {total} = {value}"
    if derivation.inner.first_order or k == 0:
        return
    for j, name in enumerate(at_0):
        slopes = derivation.jacobian[:, j].tolist()
        rule = _abbreviated([f"dL_q/d{p} d{p}/d{name}" for p in at_k], " + ")
        yield f"    dL_q/d{name} = {rule}"
        products = [f"{g} * {_in_sum(s)}" for g, s in zip(gradient, slopes, strict=True)]
        value = derivation.closed_form[j].item()
        yield f"{' ' * (11 + len(name))}= {_abbreviated(products, ' + ')} = {value}"
    matrix = "I - inner_lr H_s" if k == 1 else f"(I - inner_lr H_s)^{k}"
    yield f"    where d(w{k}, b{k})/d(w0, b0) = {matrix}, with H_s the Hessian of L_s"


def _three_ways(derivation: Derivation) -> Iterator[str]:
    inputs = len(derivation.theta) - 1
    rows = {
        "autograd (learn2learn)": derivation.autograd,
        "closed form": derivation.closed_form,
        "finite differences": derivation.finite_difference,
    }
    columns = [
        [name, *(str(v) for v in values)]
        for name, *values in zip(names(inputs), *(row.tolist() for row in rows.values()), strict=True)
    ]
    for label, *cells in zip(["", *rows], *columns, strict=True):
        row = "".join(f"{cell:<24}" for cell in cells)
        yield f"  {label:<24}{row}".rstrip()
    allowed = max(
        derivation.closed_form_tolerance.max().item(),
        derivation.finite_difference_tolerance.max().item(),
    )
    verdict = "do NOT agree" if derivation.disagreements() else "agree"
    yield f"  They {verdict} within rounding (here {allowed:.1e}). Finite differences are in float64."


def _difference(first: Derivation, second: Derivation) -> str:
    """Say in one line how the second order differs from the first, and why."""
    k, lr = second.inner.steps, second.inner.lr
    if k == 0:
        return "Without an inner step there is nothing to differentiate through: the orders are one."
    ratio, angle = ratio_and_angle(first, second)
    if ratio is None:
        return "Both meta-gradients are zero: the fast weights already minimise the query loss."
    inputs = len(first.theta) - 1
    turned = [
        name
        for name, a, b in zip(names(inputs), first.autograd, second.autograd, strict=True)
        if a * b < 0
    ]
    signs = f"the sign of {' and '.join(turned)} turned" if turned else "no sign turned"
    direction = "" if angle is None else f", {angle:.3g} degrees apart"

    H_s, _ = quadratic(second.task.support_x.double(), second.task.support_y.double())
    eigenvalue = 1 - lr * torch.linalg.eigvalsh(H_s)[-1].item()
    update = "the update" if k == 1 else f"each of the {k} updates"
    meaning = (
        "it overshoots the minimum there"
        if eigenvalue < 0
        else "what it puts right anyway counts for less"
    )
    return (
        f"Second order against first: {signs}, {ratio:.3g} times as long{direction}, because the "
        f"derivative through {update} multiplies by I - inner_lr H_s, whose eigenvalue along the "
        f"support loss's steepest direction is {eigenvalue:.3g}: {meaning}."
    )


def _in_sum(value: float) -> str:
    """Write a number as an operand: a negative one in brackets."""
    return f"({value})" if value < 0 else f"{value}"


def _abbreviated(terms: Sequence[str], joint: str) -> str:
    if len(terms) <= TERMS_SHOWN:
        return joint.join(terms)
    shown = [*terms[: TERMS_SHOWN - 1], "...", terms[-1]]
    return f"{joint.join(shown)} ({len(terms)} in all)"
