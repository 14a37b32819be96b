"""Compare Hessian-vector products with finite differences of the gradient."""

from collections.abc import Callable

import torch

from maml_pipeline.meta_gradient.inner_loop import Parameters


def second_derivative_is_wrong(
    slope: Callable[[Parameters], Parameters],
    product: Callable[[Parameters, Parameters], Parameters],
    theta: Parameters,
    u: Parameters,
    d: Parameters,
) -> bool:
    """Compare u^T J d, with J the derivative of the gradient, by autograd and by finite differences.

    Args:
        slope: theta -> gradient of the loss.
        product: (theta, vector) -> Hessian-vector product of the loss.
        theta: Where to compare.
        u: A random direction.
        d: Another one. It is set to zero where the gradient is zero: parameters excluded from learning,
            such as the padding row of an embedding, may still influence the loss.

    Returns:
        Whether the two differ; `False` if the differences are inconclusive.
    """
    at_theta = slope(theta)
    d = {name: torch.where(g == 0, torch.zeros_like(g), d[name]) for name, g in at_theta.items()}
    by_autograd = sum(_inner_products(product(theta, u), d))
    negligible = 1e-3 * sum(map(abs, _inner_products(u, at_theta)))

    def central_difference(h: float) -> tuple[float, float]:
        """Return u^T J d and the sum of the magnitudes of its terms."""
        plus = slope({name: p + h * d[name] for name, p in theta.items()})
        minus = slope({name: p - h * d[name] for name, p in theta.items()})
        terms = _inner_products({name: (plus[name] - minus[name]) / (2 * h) for name in plus}, u)
        return sum(terms), sum(map(abs, terms))

    for h in (1e-5, 1e-7, 1e-3):
        by_differences, scale = central_difference(h)
        error, scale = abs(by_differences - by_autograd), scale + negligible
        if not error > 1e-4 * scale:
            return False
        again, _ = central_difference(h / 2)
        if error > 1e-3 * scale and abs(again - by_differences) < 0.1 * error:
            return True
    return False  # kinks or rounding make the differences inconclusive


def _inner_products(first: Parameters, second: Parameters) -> list[float]:
    return torch.stack([(first[name] * second[name]).sum() for name in first]).tolist()
