"""Measure how far rounding alone changes a float32 meta-gradient of Omniglot, for docs/performance.md.

    python -m scripts.measure_rounding

What is measured: the relative change of the first-order meta-gradient (20-way 1-shot, 8 tasks, 5 inner
steps, initial parameters) when the parameters change in their last digits, and when another engine,
which sums in another order, computes it.

How to read the output: a large change in float32 beside a tiny one in float64 is rounding, not an error.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from maml_pipeline.meta_gradient import Engine, InnerLoop, NativeEngine, VectorizedEngine
from maml_pipeline.networks import ConvNet
from maml_pipeline.tasks import Omniglot


def main() -> None:
    """Print the relative changes for two initialisations."""
    batch = Omniglot(ways=20, shots=1).batch(0, "train", range(8))
    inner = InnerLoop(0.1, 5, first_order=True)

    def gradient(engine: Engine, network: nn.Module) -> Tensor:
        dtype = next(network.parameters()).dtype
        x, y = batch.support_x.to(dtype), batch.query_x.to(dtype)
        converted = batch._replace(support_x=x, query_x=y)
        parts = engine.meta_gradient(network, cross_entropy, converted, inner).gradient.values()
        return torch.cat([g.flatten() for g in parts])

    for seed in range(2):
        torch.manual_seed(seed)
        network = ConvNet(20)
        perturbed = copy.deepcopy(network)
        with torch.no_grad():
            for p in perturbed.parameters():
                p.mul_(1 + 1e-6 * torch.randn_like(p))
        for precision in (torch.float32, torch.float64):
            start, nearby = network.to(precision), perturbed.to(precision)
            vectorized = gradient(VectorizedEngine(), start)
            print(
                f"seed {seed}, {precision}: "
                f"parameters {relative(gradient(VectorizedEngine(), nearby), vectorized):.1e}, "
                f"engine native {relative(gradient(NativeEngine(), start), vectorized):.1e}"
            )


def relative(other: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over that of the reference."""
    return float((other - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
