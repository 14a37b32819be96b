"""Measure how far the Hessian-free meta-gradient is from exact second order, for docs/engines.md.

    MAML_OMNIGLOT_ROOT=data/omniglot OMP_NUM_THREADS=1 python -m scripts.measure_hessian_free

What is measured: the meta-gradient of one meta-batch with each config's inner learning rate, at the
initial parameters and after meta-steps of exact second order with Adam.

How to read the table: cosine and relative error |g - g_2| / |g_2| against exact second order g_2 in the
same type, float32 or float64; of first order and of the Hessian-free method.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Loss, NativeEngine, VectorizedEngine
from maml_pipeline.meta_gradient.order_gap import OrderGap, order_gaps
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Omniglot, SineWaves, TaskBatch, TaskDistribution


class Case(NamedTuple):
    """A network, its loss, its tasks, how many of them in a meta-batch, and the inner learning rate."""

    build: Callable[[], nn.Module]
    loss: Loss
    distribution: TaskDistribution
    tasks: int
    lr: float
    trained: int
    """Meta-steps before the second measurement."""


def cases() -> dict[str, Case]:
    """Return the cases by name."""
    return {
        "sine": Case(MLP, mse_loss, SineWaves(), 25, 0.01, 500),
        "Omniglot 5-way 1-shot": Case(
            lambda: ConvNet(5), cross_entropy, Omniglot(ways=5, shots=1), 16, 0.4, 50
        ),
        "Omniglot 20-way 1-shot": Case(
            lambda: ConvNet(20), cross_entropy, Omniglot(ways=20, shots=1), 4, 0.1, 20
        ),
    }


def train(network: nn.Module, case: Case, steps: int) -> None:
    """Take the case's meta-steps of exact second order."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(case.trained):
        indices = range(case.tasks * (step + 1), case.tasks * (step + 2))
        batch = case.distribution.batch(0, "train", indices)
        result = NativeEngine().meta_gradient(network, case.loss, batch, InnerLoop(case.lr, steps))
        for name, p in network.named_parameters():
            p.grad = result.gradient[name]
        optimizer.step()


def gaps(case: Case, network: nn.Module, steps: int, dtype: torch.dtype) -> tuple[OrderGap, OrderGap]:
    """Compare first order, and the Hessian-free method, with exact second order."""
    network = network.to(dtype)
    batch = case.distribution.batch(0, "train", range(case.tasks))
    batch = TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in batch))

    def gradient(inner: InnerLoop) -> dict[str, Tensor]:
        return VectorizedEngine(8).meta_gradient(network, case.loss, batch, inner).gradient

    exact = InnerLoop(case.lr, steps, method="checkpointed")
    second = gradient(exact)
    others = exact.in_first_order(), InnerLoop(case.lr, steps, method="hessian_free")
    first, free = (order_gaps(gradient(inner), second)[""] for inner in others)
    return first, free


def rows() -> Iterator[str]:
    """Measure and format the rows of the table."""
    for name, case in cases().items():
        for steps in (1, 5):
            torch.manual_seed(0)
            network = case.build()
            for at in ("initial", f"after {case.trained}"):
                if at != "initial":
                    train(network.float(), case, steps)
                for dtype in (torch.float32, torch.float64):
                    first, free = gaps(case, network, steps, dtype)
                    yield (
                        f"| {name} | {steps} | {at} | {str(dtype)[6:]} | {first.cosine:.3f} "
                        f"| {first.relative_error:.2f} | {free.cosine:.6f} | {free.relative_error:.1g} |"
                    )


def main() -> None:
    """Print the table."""
    headings = ("first order, cosine", "error", "Hessian-free, cosine", "error")
    print("| network | k | parameters | type | " + " | ".join(headings) + " |")
    print("|---|---:|---|---|" + 4 * "---:|")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
