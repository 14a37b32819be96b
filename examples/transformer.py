"""Adapt a low-rank adapter and the head of a transformer, while everything is meta-learned.

Each task is a shop: from ten baskets of items and their totals, predict the totals of other baskets. A
meta-step trains the whole transformer; its inner loop moves the adapter and the head, so that the
attention layers run once per meta-step, without a copy of their parameters for each task.

    python examples/transformer.py                   # less than a minute on a CPU
    python examples/transformer.py --max_steps 20    # only checks that it runs
"""

import argparse
import logging
import time

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, Task, TaskDataModule, TaskDistribution
from maml_pipeline.meta_gradient.inner_loop import adapted_names
from maml_pipeline.tasks import Split, random_generator

ITEMS, BASKET = 16, 6
PARTS = {"head": ["head.*"], "adapter and head": ["adapter.*", "head.*"], "all": None}
INNER_STEPS = (0, 1, 5)


class Shops(TaskDistribution):
    """Baskets of items `(S, 6)` and their totals `(S, 1)`; the prices of a shop follow three trends."""

    def __init__(self, shots: int = 10) -> None:
        self.shots = shots
        self.trends = random_generator(0, "train", 0).normal(size=(ITEMS, 3))

    def task(self, seed: int, split: Split, index: int) -> Task:
        """Draw a shop's prices and its baskets."""
        random = random_generator(seed, split, index)
        prices = self.trends @ random.normal(size=3)
        baskets = random.integers(ITEMS, size=(2 * self.shots, BASKET))
        totals = torch.from_numpy(prices[baskets].sum(1, keepdims=True)).float() / BASKET**0.5
        x = torch.from_numpy(baskets)
        return Task(x[: self.shots], totals[: self.shots], x[self.shots :], totals[self.shots :])


class Adapter(nn.Module):
    """Add a product of low rank to the features: h + U D h, with D `(rank, width)`."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)  # starts as the identity

    def forward(self, h: Tensor) -> Tensor:
        adapted: Tensor = h + self.up(self.down(h))
        return adapted


class Layer(nn.Module):
    """Attention with one head and a perceptron, each added to its normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm_1(h)).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.mT / h.shape[-1] ** 0.5, dim=-1)
        h = h + self.out(weights @ value)
        result: Tensor = h + self.perceptron(self.norm_2(h))
        return result


class Transformer(nn.Module):
    """Two layers of attention over the items, then an adapter and a linear head on their mean."""

    def __init__(self, width: int = 32, rank: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ITEMS, width)
        self.layers = nn.Sequential(Layer(width), Layer(width), nn.LayerNorm(width))
        self.adapter = Adapter(width, rank)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.layers(self.embedding(x))
        prediction: Tensor = self.head(self.adapter(features).mean(1))
        return prediction


def train_and_test(adapt: list[str] | None, max_steps: int) -> str:
    """Meta-train a transformer of which a part adapts, and return a row of the table."""
    torch.manual_seed(0)  # the same initial parameters
    network = Transformer()
    names = adapted_names(network, adapt)
    learner = MetaLearner(network, loss=mse_loss, inner_lr=0.02, inner_steps=5, adapt=adapt)
    data = TaskDataModule(Shops(), meta_batch_size=16, test_tasks=200)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(learner, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = trainer.test(learner, datamodule=data, verbose=False)
    adapted = sum(network.get_parameter(name).numel() for name in names)
    losses = "".join(f"{result[f'test/loss_step_{k}']:8.3f}" for k in INNER_STEPS)
    return f"{adapted:8}{losses}{seconds:10.1f} s"


def main() -> None:
    """Print the test loss for each part of the transformer that adapts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=100, help="meta-steps (default: 100)")
    max_steps = parser.parse_args().max_steps
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    size = sum(p.numel() for p in Transformer().parameters())
    print(f"Test loss after k inner steps, {max_steps} meta-steps of all {size} parameters")
    print(f"{'adapted':16}  number" + "".join(f"{f'k = {k}':>8}" for k in INNER_STEPS) + "    training")
    for name, adapt in PARTS.items():
        print(f"{name:16}" + train_and_test(adapt, max_steps), flush=True)


if __name__ == "__main__":
    main()
