"""Format a derivation as text of 80 columns, in the order in which it is computed."""

import textwrap
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from maml_pipeline.derivation.result import Derivation, InnerStep, parameter_names, ratio_and_angle
from maml_pipeline.meta_gradient.closed_form import quadratic

WIDTH = 80
MAX_TERMS = 6
NO_BREAK_SPACE = "\u00a0"
"""Keeps a product or a point on one line where text is wrapped."""


def to_text(derivations: Sequence[Derivation]) -> str:
    """Format derivations of one task, and a comparison of the two orders if both are given.

    Args:
        derivations: First order, second order or both, in this sequence.
    """
    lines = list(_problem(derivations[0]))
    for derivation in derivations:
        lines += ["", *_derivation(derivation)]
    if len(derivations) == 2:
        lines += ["", *_comparison(*derivations)]
    return "\n".join(lines)


def _problem(derivation: Derivation) -> Iterator[str]:
    inner, task = derivation.inner, derivation.task
    dtype = str(derivation.theta.dtype).removeprefix("torch.")
    yield "One linear unit y = w x + b with mean squared error: L_s on the support set,"
    yield f"L_q on the query set. inner_lr {inner.lr:g}, inner_steps {inner.steps}, {dtype}."
    yield from _wrap("  support (x, y): ", _points(task.support_x, task.support_y))
    yield from _wrap("  query (x, y):   ", _points(task.query_x, task.query_y))


def _derivation(derivation: Derivation) -> Iterator[str]:
    inner, k = derivation.inner, derivation.inner.steps
    inputs = len(derivation.theta) - 1
    order, flag = ("First", "False") if inner.first_order else ("Second", "True")
    yield _heading(f"{order} order: create_graph={flag}")

    yield "Initial parameters"
    for name, value in zip(parameter_names(inputs, "0"), derivation.theta.tolist(), strict=True):
        yield f"  {name} = {value}"
    if k == 0:
        yield "No inner steps: the query loss is evaluated at the initial parameters"
    for t, step in enumerate(derivation.inner_steps):
        yield from _inner_step(step, t, inner.lr, k)

    yield "Query loss"
    arguments = ", ".join(_abbreviate(parameter_names(inputs, str(k))))
    yield f"  L_q({arguments}) = {derivation.query_loss.item()}"
    if k == 0:
        yield "Meta-gradient: dL_q/dw0"
    elif inner.first_order:
        yield f"Meta-gradient: dL_q/dw{k}, stopping at the fast weights"
    else:
        yield f"Meta-gradient: dL_q/dw0, through the inner step{'' if k == 1 else 's'}"
    yield from _chain_rule(derivation)
    yield from _methods(derivation)

    yield "Outer update"
    differentiated = str(k) if inner.first_order else "0"
    for name, of, theta, gradient, updated in zip(
        parameter_names(inputs, "0"),
        parameter_names(inputs, differentiated),
        derivation.theta.tolist(),
        derivation.autograd.tolist(),
        derivation.updated.tolist(),
        strict=True,
    ):
        product = f"{derivation.outer_lr:g} * {_operand(gradient)}"
        yield from _equation(
            f"  {name}'", f"{name} - outer_lr * dL_q/d{of}", f"{theta} - {product}", updated
        )


def _inner_step(step: InnerStep, t: int, lr: float, k: int) -> Iterator[str]:
    inputs = len(step.theta) - 1
    before, after = parameter_names(inputs, str(t)), parameter_names(inputs, str(t + 1))
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
        rule = f"{old} - inner_lr * dL_s/d{old}"
        yield from _equation(f"  {new}", rule, f"{theta} - {lr:g} * {_operand(g)}", value)


def _chain_rule(derivation: Derivation) -> Iterator[str]:
    """Write out the closed form with its numbers."""
    task, k = derivation.task, derivation.inner.steps
    inputs = len(derivation.theta) - 1
    fast_names, initial_names = parameter_names(inputs, str(k)), parameter_names(inputs, "0")
    residuals = (
        task.query_x @ derivation.fast_weights[:-1, None] + derivation.fast_weights[-1] - task.query_y
    )
    Q = len(residuals)
    factor = "2" if Q == 1 else f"2/{Q}"
    gradient = derivation.query_gradient.tolist()
    yield "  By hand, with r = w x + b - y at the query points and fast weights:"
    for i, (name, value) in enumerate(zip(fast_names, gradient, strict=True)):
        x = task.query_x[:, i].tolist() if i < inputs else [1.0] * Q
        products = [f"{r} * {_operand(v)}" for r, v in zip(residuals.flatten().tolist(), x, strict=True)]
        total = _sum(products)
        total = total if Q == 1 else f"({total})"
        rule = "2 r" if Q == 1 else f"2/{Q} sum r"
        rule += f" x[{i}]" if i < inputs and inputs > 1 else " x" if i < inputs else ""
        yield from _equation(f"    dL_q/d{name}", rule, f"{factor} * {total}", value)
    if derivation.inner.first_order or k == 0:
        return
    for j, name in enumerate(initial_names):
        slopes = derivation.jacobian[:, j].tolist()
        rule = _sum([f"dL_q/d{p} d{p}/d{name}" for p in fast_names])
        products = [f"{g} * {_operand(s)}" for g, s in zip(gradient, slopes, strict=True)]
        yield from _equation(f"    dL_q/d{name}", rule, _sum(products), derivation.closed_form[j].item())
    matrix = "I - inner_lr H_s" if k == 1 else f"(I - inner_lr H_s)^{k}"
    yield f"    where d(w{k}, b{k})/d(w0, b0) = {matrix}, H_s the Hessian of L_s"


def _methods(derivation: Derivation) -> Iterator[str]:
    """Tabulate the meta-gradient by each method, a row per parameter."""
    columns = {
        "autograd": derivation.autograd,
        "closed form": derivation.closed_form,
        "finite differences": derivation.finite_difference,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    names = parameter_names(len(derivation.theta) - 1)
    for name, *cells in [("", *columns), *((n, *row) for n, row in zip(names, rows, strict=True))]:
        yield f"  {name:<6}{''.join(f'{cell!s:<24}' for cell in cells)}".rstrip()
    error = max(
        derivation.closed_form_tolerance.max().item(),
        derivation.finite_difference_tolerance.max().item(),
    )
    verdict = "do NOT agree" if derivation.disagreements() else "agree"
    yield f"  They {verdict} within the rounding tolerance, {error:.1e}."
    yield "  Finite differences use float64."


def _comparison(first: Derivation, second: Derivation) -> Iterator[str]:
    """Say how the second-order meta-gradient differs from the first-order one, and why."""
    yield _heading("Second order compared with first order")
    k, lr = second.inner.steps, second.inner.lr
    if k == 0:
        yield "Identical: without inner steps there is nothing to differentiate through."
        return
    ratio, angle = ratio_and_angle(first, second)
    if ratio is None:
        yield "Both are zero: the fast weights already minimise the query loss."
        return
    names = parameter_names(len(first.theta) - 1)
    pairs = zip(names, first.autograd, second.autograd, strict=True)
    flipped = [name for name, a, b in pairs if a * b < 0]
    yield from _wrap("  Signs:  ", f"{', '.join(flipped)} flipped" if flipped else "unchanged")
    yield f"  Length: {ratio:.3g} times as long"
    if angle is not None:
        yield f"  Angle:  {angle:.3g} degrees apart"

    H_s, _ = quadratic(second.task.support_x.double(), second.task.support_y.double())
    eigenvalue = 1 - lr * torch.linalg.eigvalsh(H_s)[-1].item()
    effect = (
        "an inner step overshoots the minimum."
        if eigenvalue < 0
        else "inner steps already reduce the error, so the component shrinks."
    )
    yield "  Reason: Each inner step multiplies the gradient by I - inner_lr H_s."
    yield f"          Along the steepest direction of L_s, its eigenvalue is {eigenvalue:.3g}:"
    yield f"          there, {effect}"


def _heading(title: str) -> str:
    return f"{title} {'=' * (WIDTH - len(title) - 1)}"


def _equation(left: str, rule: str, numbers: str, value: float) -> Iterator[str]:
    """Write `left = rule = numbers = value`, on one line if it fits, else a line per side."""
    line = f"{left} = {rule} = {numbers} = {value}".replace(NO_BREAK_SPACE, " ")
    if len(line) <= WIDTH:
        yield line
        return
    indent = " " * len(left)
    for start, side in ((left, rule), (indent, numbers), (indent, str(value))):
        yield from _wrap(f"{start} = ", side)


def _wrap(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False
    )
    return [line.replace(NO_BREAK_SPACE, " ") for line in lines]


def _points(x: Tensor, y: Tensor) -> str:
    points = [
        f"({', '.join(f'{value:g}' for value in [*inputs, *target])})"
        for inputs, target in zip(x.tolist(), y.tolist(), strict=True)
    ]
    unbroken = [point.replace(" ", NO_BREAK_SPACE) for point in _abbreviate(points)]
    return f"{' '.join(unbroken)}{_count(points)}"


def _operand(value: float) -> str:
    """Write a number as an operand: a negative one in parentheses."""
    return f"({value})" if value < 0 else f"{value}"


def _sum(terms: Sequence[str]) -> str:
    unbroken = [term.replace(" ", NO_BREAK_SPACE) for term in _abbreviate(terms)]
    return f"{' + '.join(unbroken)}{_count(terms)}"


def _count(terms: Sequence[str]) -> str:
    return f" ({len(terms)} in all)" if len(terms) > MAX_TERMS else ""


def _abbreviate(terms: Sequence[str]) -> Sequence[str]:
    """Keep the first terms and the last of a long list."""
    return terms if len(terms) <= MAX_TERMS else [*terms[: MAX_TERMS - 1], "...", terms[-1]]
