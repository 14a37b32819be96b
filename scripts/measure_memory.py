"""The memory table of docs/performance.md: bytes that one task's meta-gradient holds at its peak.

Beside the engines stands the plain learn2learn loop, whose network is of PyTorch's own layers.
"""

import torch
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Loss, VectorizedEngine
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import SineWaves, TaskBatch
from scripts.benchmark_peers import learn2learn_loop, with_native_layers


def images(ways: int) -> TaskBatch:
    """Make one task of random images, which need what Omniglot's need."""
    x, y = torch.rand(2, 1, ways, 1, 28, 28), torch.arange(ways)[None]
    return TaskBatch(x[0], y, x[1], y)


def main() -> None:
    """Print the rows."""
    cases: list[tuple[str, torch.nn.Module, Loss, TaskBatch]] = [
        ("Omniglot 5-way 1-shot", ConvNet(5), cross_entropy, images(5)),
        ("Omniglot 20-way 1-shot", ConvNet(20), cross_entropy, images(20)),
        ("sine, 10 shots, MLP", MLP(), mse_loss, SineWaves().batch(0, "train", [0])),
    ]
    engine = VectorizedEngine()
    for name, network, loss, batch in cases:

        def peak(inner: InnerLoop) -> int:
            engine.meta_gradient(network, loss, batch, inner)  # noqa: B023  # used at once
            return peak_bytes(lambda: engine.meta_gradient(network, loss, batch, inner))  # noqa: B023

        def plain_peak(inner: InnerLoop) -> int:
            native = with_native_layers(network)  # noqa: B023

            def meta_step() -> None:
                native.zero_grad()
                learn2learn_loop(native, loss, batch, inner)  # noqa: B023

            meta_step()
            native.zero_grad()  # so that its gradient counts, as the engines' does
            return peak_bytes(meta_step)

        plain = [plain_peak(InnerLoop(0.01, 10, first_order=order)) for order in (True, False)]
        first = peak(InnerLoop(0.01, 10, first_order=True))
        unrolled = peak(InnerLoop(0.01, 10))
        checkpointed, hundred = (peak(InnerLoop(0.01, k, checkpointed=True)) for k in (10, 100))
        print(
            f"| {name} | {plain[0] / 1e6:.4g} MB | {first / 1e6:.4g} MB | {plain[1] / 1e6:.4g} MB "
            f"| {unrolled / 1e6:.4g} MB | {checkpointed / 1e6:.4g} MB | {checkpointed / plain[1]:.3f} "
            f"| {checkpointed / first:.2f} | {hundred / 1e6:.4g} MB |"
        )


if __name__ == "__main__":
    main()
