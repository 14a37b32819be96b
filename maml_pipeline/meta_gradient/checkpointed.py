"""Second order without the graph of the inner loop: keep parameters, and walk back over the steps.

With lambda = dL_query/dtheta_k, the chain rule through theta_{t+1} = theta_t - alpha grad L(theta_t)
is lambda <- lambda - alpha H(theta_t) lambda, one Hessian-vector product a step. Only theta_t is
needed for it: what the step computed is computed again, and freed before the next one.

Not even every theta_t is kept. Of k steps each ceil(sqrt(k))th is, and a segment between two of them
is stepped through again when the walk arrives there, so that about 2 sqrt(k) are held at a time.

References:
    Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
    differentiation", 1992; Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory
    Cost", 2016, section 3 (the schedule); Kemaev et al., "Scalable Meta-Learning via Mixed-Mode
    Differentiation", 2025 (forward over reverse in the inner loop).
"""

from math import ceil, sqrt

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maml_pipeline.meta_gradient.adaptation import GroupLoss, gradient, inner_step
from maml_pipeline.meta_gradient.inner_loop import Parameters


class KeptParameters:
    """Those of theta_0 .. theta_{k-1} from which `walk_back` can reach the others.

    Args:
        steps: k.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.segment = max(1, ceil(sqrt(steps)))
        self._by_step: dict[int, Parameters] = {}

    def offer(self, t: int, theta_t: Parameters) -> None:
        """Keep theta_t where it starts a segment, or lies in the last one, which is walked first."""
        last_start = (self.steps - 1) // self.segment * self.segment
        if t % self.segment == 0 or t > last_start:
            self._by_step[t] = theta_t

    def pop(self, t: int, group_loss: GroupLoss, x: Tensor, y: Tensor, lr: float) -> Parameters:
        """Hand theta_t over for good, stepping through its segment again where need be."""
        start = t // self.segment * self.segment
        for s in range(start, t):
            if s + 1 not in self._by_step:
                self._by_step[s + 1], _ = inner_step(group_loss, self._by_step[s], x, y, lr)
        return self._by_step.pop(t)

    @staticmethod
    def most_held(steps: int) -> int:
        """Count the parameters beyond theta_0 that are held while a Hessian is multiplied."""
        segment = max(1, ceil(sqrt(steps)))
        return max((t // segment + t % segment for t in range(steps)), default=0)


def walk_back(
    lambda_: Parameters, kept: KeptParameters, group_loss: GroupLoss, x: Tensor, y: Tensor, lr: float
) -> Parameters:
    """Carry dL_query/dtheta_k back to dL_query/dtheta_0, for every task: `(G, ...)` each.

    Hessians are multiplied forward over reverse, which keeps no graph of the gradient, or reverse
    over reverse where the network has an operation that PyTorch cannot do the first way (its native
    batch normalisation is one).

    Args:
        lambda_: dL_query/dtheta_k.
        kept: Filled while the group adapted; empty afterwards.
        group_loss: The losses of all tasks at once.
        x: Support inputs `(G, S, ...)`.
        y: Support targets.
        lr: Inner learning rate alpha.
    """
    hessian_vector_product = forward_over_reverse
    for t in reversed(range(kept.steps)):
        theta_t = kept.pop(t, group_loss, x, y, lr)
        try:
            product = hessian_vector_product(group_loss, theta_t, x, y, lambda_)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or t < kept.steps - 1:
                raise
            hessian_vector_product = reverse_over_reverse
            product = hessian_vector_product(group_loss, theta_t, x, y, lambda_)
        del theta_t
        lambda_ = {name: v - lr * product[name] for name, v in lambda_.items()}
    return lambda_


def forward_over_reverse(
    group_loss: GroupLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply every task's Hessian with its vector: differentiate the gradient while computing it."""
    with forward_ad.dual_level():
        dual = {
            name: forward_ad.make_dual(p.detach().requires_grad_(), vector[name])
            for name, p in theta.items()
        }
        losses, _ = group_loss(dual, x, y)
        tangents = {
            name: forward_ad.unpack_dual(g).tangent for name, g in gradient(losses, dual).items()
        }
    return {
        name: torch.zeros_like(vector[name]) if tangent is None else tangent
        for name, tangent in tangents.items()
    }


def reverse_over_reverse(
    group_loss: GroupLoss, theta: Parameters, x: Tensor, y: Tensor, vector: Parameters
) -> Parameters:
    """Multiply every task's Hessian with its vector: differentiate <gradient, vector> by theta."""
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    losses, _ = group_loss(theta, x, y)
    first = gradient(losses, theta, create_graph=True)
    product = sum((g * vector[name]).sum() for name, g in first.items())
    assert isinstance(product, Tensor)
    if not product.requires_grad:  # the loss is linear in every parameter
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    return gradient(product, theta)
