"""Measure the peak memory of one task's meta-gradient, for docs/performance.md.

    python -m scripts.measure_memory

What is measured: bytes that the allocator hands out above the start, exact and reproducible, for a plain
learn2learn loop with PyTorch's own layers and for the vectorized engine.

How to read the table, for k = 10 inner steps unless stated: "loop" is the learn2learn loop, the
other columns are the engine. "Of loop" and "of first" are the checkpointed memory divided by the loop's
second order and by the engine's first order.
"""

import torch
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Loss, NativeEngine
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import SineWaves, TaskBatch
from scripts.benchmark_peers import learn2learn_loop, with_native_layers


def images(ways: int) -> TaskBatch:
    """Return one task of random images, which needs the same memory as Omniglot's."""
    x, y = torch.rand(2, 1, ways, 1, 28, 28), torch.arange(ways)[None]
    return TaskBatch(x[0], y, x[1], y)


def main() -> None:
    """Print the table."""
    cases: list[tuple[str, torch.nn.Module, Loss, TaskBatch]] = [
        ("Omniglot 5-way 1-shot", ConvNet(5), cross_entropy, images(5)),
        ("Omniglot 20-way 1-shot", ConvNet(20), cross_entropy, images(20)),
        ("sine, 10 shots, MLP", MLP(), mse_loss, SineWaves().batch(0, "train", [0])),
    ]
    engine = NativeEngine()
    print(
        "| task | loop, first | first | loop, second | unrolled | checkpointed | of loop | of first "
        "| checkpointed, k = 100 |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, network, loss, batch in cases:

        def peak(inner: InnerLoop) -> int:
            engine.meta_gradient(network, loss, batch, inner)  # noqa: B023  # called in this iteration
            return peak_bytes(lambda: engine.meta_gradient(network, loss, batch, inner))  # noqa: B023

        def plain_peak(inner: InnerLoop) -> int:
            native = with_native_layers(network)  # noqa: B023

            def meta_step() -> None:
                native.zero_grad()
                learn2learn_loop(native, loss, batch, inner)  # noqa: B023

            meta_step()
            native.zero_grad()  # the gradient counts, as it does for the engine
            return peak_bytes(meta_step)

        plain = [plain_peak(InnerLoop(0.01, 10, first_order=order)) for order in (True, False)]
        first = peak(InnerLoop(0.01, 10, first_order=True))
        unrolled = peak(InnerLoop(0.01, 10))
        checkpointed, hundred = (peak(InnerLoop(0.01, k, method="checkpointed")) for k in (10, 100))
        print(
            f"| {name} | {plain[0] / 1e6:.4g} MB | {first / 1e6:.4g} MB | {plain[1] / 1e6:.4g} MB "
            f"| {unrolled / 1e6:.4g} MB | {checkpointed / 1e6:.4g} MB | {checkpointed / plain[1]:.3f} "
            f"| {checkpointed / first:.2f} | {hundred / 1e6:.4g} MB |"
        )


if __name__ == "__main__":
    main()
