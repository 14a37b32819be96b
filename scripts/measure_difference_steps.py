"""Measure how the error of central differences of gradients depends on their step, for docs/engines.md.

    MAML_OMNIGLOT_ROOT=data/omniglot OMP_NUM_THREADS=1 python -m scripts.measure_difference_steps

How to read the table: relative error of the meta-gradient of one meta-batch whose Hessian-vector
products are (g(theta + e v) - g(theta - e v)) / 2 e, against exact second order in the same type; the
step is e |v| / (1 + |theta|). Long steps cross kinks, short ones round.
"""

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.adaptation import gradient
from maml_pipeline.meta_gradient.checkpointed import checkpointed, sweep
from maml_pipeline.meta_gradient.chunk_loss import vectorized_loss
from maml_pipeline.meta_gradient.exactness import Workarounds
from maml_pipeline.meta_gradient.inner_loop import Parameters
from maml_pipeline.meta_gradient.order_gap import order_gaps
from maml_pipeline.tasks import TaskBatch
from scripts.measure_hessian_free import Case, cases, train

TASKS = 8
STEPS = {torch.float32: range(-1, -7, -1), torch.float64: range(-6, -11, -1)}


def lengths(vector: Parameters) -> Tensor:
    """Return the length of each task's part `(T,)`."""
    parts: Tensor = torch.cat([v.flatten(1) for v in vector.values()], dim=1)
    return parts.square().sum(dim=1).sqrt()


def error(case: Case, network: nn.Module, steps: int, step: float) -> float:
    """Return the error of central differences in the network's type."""
    theta = {name: p.detach() for name, p in network.named_parameters()}
    dtype = next(iter(theta.values())).dtype
    batch = case.distribution.batch(0, "train", range(TASKS))
    batch = TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in batch))
    losses = vectorized_loss(network, case.loss, Workarounds(), (*theta,), frozenset())
    inner = InnerLoop(case.lr, steps)

    def product(theta_t: Parameters, vector: Parameters) -> Parameters:
        e = step * (1 + lengths(theta_t)) / lengths(vector)
        sides = []
        for sign in (1, -1):
            moved = {
                name: (p + sign * e.view(-1, *[1] * (p.dim() - 1)) * vector[name]).requires_grad_()
                for name, p in theta_t.items()
            }
            sides.append(gradient(losses(moved, batch.support_x, batch.support_y)[0] / (2 * e), moved))
        return {name: ahead - sides[1][name] for name, ahead in sides[0].items()}

    exact = checkpointed(losses, theta, batch, inner).gradient
    return order_gaps(sweep(losses, theta, batch, inner, product).gradient, exact)[""].relative_error


def main() -> None:
    """Print the table."""
    print(
        "| network | k | parameters | type | " + " | ".join(f"1e{p}" for p in range(-1, -11, -1)) + " |"
    )
    print("|---|---:|---|---|" + 10 * "---:|")
    for name, case in cases().items():
        for steps in (1, 5):
            torch.manual_seed(0)
            network = case.build()
            for at in ("initial", f"after {case.trained}"):
                if at != "initial":
                    train(network.float(), case, steps)
                for dtype, powers in STEPS.items():
                    network.to(dtype)
                    cells = [
                        f"{error(case, network, steps, 10.0**p):.1g}" if p in powers else ""
                        for p in range(-1, -11, -1)
                    ]
                    row = (name, str(steps), at, str(dtype)[6:], *cells)
                    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
