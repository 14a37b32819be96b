"""Second order without the graph of the inner loop: keep parameters, and walk back over the steps.

With lambda = dL_query/dtheta_k, the chain rule through theta_{t+1} = theta_t - alpha grad L(theta_t)
is lambda <- lambda - alpha H(theta_t) lambda, one Hessian-vector product a step. Only theta_t is
needed for it: what the step computed is computed again, and freed before the next one.

Not even every theta_t is kept: the steps are cut into segments, only the first theta of each is kept,
and a segment is stepped through again when the walk arrives there. As fewer of them wait behind an
earlier segment, it may be longer: L, L - 1, ..., 1 steps with L(L + 1)/2 >= k hold L - 1 at a time,
about sqrt(2 k), at the price of less than one more inner step for each.

Hessians are multiplied by reverse over reverse: in PyTorch 2.15, forward over reverse held more and took
longer on every network of this project, since it carries a tangent with every activation.

References:
    Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation", 1992; Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory
    Cost", 2016 (keeping some states, recomputing the others); Kemaev et al., "Scalable
    Meta-Learning via Mixed-Mode Differentiation", 2025 (Hessian-vector products in the walk).
"""

from collections.abc import Callable
from math import ceil, sqrt

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import GroupLoss, gradient
from maml_pipeline.meta_gradient.inner_loop import Parameters


def longest_segment(steps: int) -> int:
    """Return L: the smallest whole number with L(L + 1)/2 >= k."""
    return ceil((sqrt(8 * steps + 1) - 1) / 2)


class KeptParameters:
    """Those of theta_0 .. theta_{k-1} from which `walk_back` can reach the others.

    Args:
        steps: k.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._starts: list[int] = []
        start, length = 0, longest_segment(steps)
        while start < steps:
            self._starts.append(start)
            start, length = start + length, length - 1
        self._by_step: dict[int, Parameters] = {}

    def offer(self, t: int, theta_t: Parameters) -> None:
        """Keep theta_t where it starts a segment, or lies in the last one, which is walked first."""
        if t in self._starts or t > self._starts[-1]:
            self._by_step[t] = theta_t

    def pop(self, t: int, step: Callable[[Parameters], Parameters]) -> Parameters:
        """Hand theta_t over for good, stepping through its segment again where need be."""
        start = max(s for s in self._starts if s <= t)
        for s in range(start, t):
            if s + 1 not in self._by_step:
                self._by_step[s + 1] = step(self._by_step[s])
        return self._by_step.pop(t)


def walk_back(
    lambda_: Parameters,
    kept: KeptParameters,
    step: Callable[[Parameters], Parameters],
    product: Callable[[Parameters, Parameters], Parameters],
    lr: float,
) -> Parameters:
    """Carry dL_query/dtheta_k back to dL_query/dtheta_0, for every task: `(G, ...)` each.

    Args:
        lambda_: dL_query/dtheta_k, which is overwritten.
        kept: Filled while the group adapted; empty afterwards.
        step: theta_t -> theta_{t+1}.
        product: (theta_t, lambda) -> H(theta_t) lambda.
        lr: Inner learning rate alpha.
    """
    for t in reversed(range(kept.steps)):
        theta_t = kept.pop(t, step)
        curvature = product(theta_t, lambda_)
        del theta_t  # before the next one is stepped to
        for name in lambda_:
            lambda_[name] = lambda_[name] - lr * curvature.pop(name)
    return lambda_


def hessian_vector_product(
    group_loss: GroupLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply every task's Hessian, the support loss's at theta, with its vector."""
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    losses, _ = group_loss(theta, x, y)
    slopes = gradient(losses, theta, create_graph=True)
    # A slope that depends on no parameter has no graph, and no curvature. The products' graph keeps
    # the vector alone, not the slopes.
    directional = [(slope * vector[name]).sum() for name, slope in slopes.items() if slope.requires_grad]
    del losses, slopes
    if not directional:
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    return gradient(torch.stack(directional), theta)
