"""Measure how far the Hessian-free meta-gradient is from exact second order, for docs/engines.md.

    MAML_OMNIGLOT_ROOT=data/omniglot OMP_NUM_THREADS=1 python -m scripts.measure_hessian_free

What is measured: the meta-gradient of one meta-batch at the initial parameters, with each config's inner
learning rate; with its ReLUs, and with softplus in their place, which has no kink.

How to read the table: cosine and relative error |g - g_2| / |g_2| against exact second order g_2 in the
same type; of first order, and of the Hessian-free method in float64 and in float32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Loss, VectorizedEngine
from maml_pipeline.meta_gradient.order_gap import OrderGap, order_gaps
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import Omniglot, SineWaves, TaskBatch


class Case(NamedTuple):
    """A network, its loss, a meta-batch, and the inner learning rate."""

    build: Callable[[], nn.Module]
    loss: Loss
    batch: TaskBatch
    lr: float


def cases() -> dict[str, Case]:
    """Return the cases by name."""
    sine = SineWaves().batch(0, "train", range(25))
    omniglot = Omniglot(ways=5, shots=1).batch(0, "train", range(32))
    return {
        "sine": Case(MLP, mse_loss, sine, 0.01),
        "Omniglot 5-way 1-shot": Case(lambda: ConvNet(5), cross_entropy, omniglot, 0.4),
    }


def without_kinks(network: nn.Module) -> nn.Module:
    """Replace every ReLU by softplus."""
    for name, module in network.named_children():
        if isinstance(module, nn.ReLU):
            setattr(network, name, nn.Softplus())
        without_kinks(module)
    return network


def gaps(case: Case, network: nn.Module, steps: int, dtype: torch.dtype) -> tuple[OrderGap, OrderGap]:
    """Compare first order, and the Hessian-free method, with exact second order."""
    network = network.to(dtype)
    batch = TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in case.batch))

    def gradient(inner: InnerLoop) -> dict[str, torch.Tensor]:
        return VectorizedEngine(8).meta_gradient(network, case.loss, batch, inner).gradient

    exact = InnerLoop(case.lr, steps, method="checkpointed")
    second = gradient(exact)
    others = exact.in_first_order(), InnerLoop(case.lr, steps, method="hessian_free")
    first, free = (order_gaps(gradient(inner), second)[""] for inner in others)
    return first, free


def rows() -> Iterator[str]:
    """Measure and format the rows of the table."""
    for name, case in cases().items():
        for activation in ("ReLU", "softplus"):
            for steps in (1, 5):
                cells = []
                for dtype in (torch.float64, torch.float32):
                    torch.manual_seed(0)
                    network = case.build() if activation == "ReLU" else without_kinks(case.build())
                    first, free = gaps(case, network, steps, dtype)
                    cells.append(f"{free.cosine:.6f} | {free.relative_error:.2g}")
                yield (
                    f"| {name}, {activation} | {steps} | {first.cosine:.3f} "
                    f"| {first.relative_error:.2f} | {' | '.join(cells)} |"
                )


def main() -> None:
    """Print the table."""
    headings = ("float64, cosine", "float64, error", "float32, cosine", "float32, error")
    print("| network | k | first order, cosine | first order, error | " + " | ".join(headings) + " |")
    print("|---|" + 7 * "---:|")
    for row in rows():
        print(row, flush=True)


if __name__ == "__main__":
    main()
