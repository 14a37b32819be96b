"""Compare first- and second-order MAML on sine-wave regression, from Python.

The task, network and settings are those of Finn et al. 2017, section 5.1, with fewer meta-steps.

    python examples/sine.py                   # less than a minute on a CPU
    python examples/sine.py --max_steps 20    # only checks that it runs
"""

import argparse
import logging
import time

import pytorch_lightning as lightning
import torch
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import SineWaves

INNER_STEPS = (0, 1, 5, 10)


def train_and_test(first_order: bool, max_steps: int) -> str:
    """Meta-train an MLP, test it on 500 new tasks, and return a row of the table."""
    torch.manual_seed(0)  # the same initial parameters for both orders
    learner = MetaLearner(
        MLP(), loss=mse_loss, inner_lr=0.01, inner_steps=1, eval_inner_steps=10,
        first_order=first_order, engine="vectorized",
    )  # fmt: skip
    data = TaskDataModule(SineWaves(shots=10), meta_batch_size=25, test_tasks=500)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(learner, datamodule=data)
    seconds = time.perf_counter() - start
    (result,) = trainer.test(learner, datamodule=data, verbose=False)
    return "".join(f"{result[f'test/loss_step_{k}']:8.3f}" for k in INNER_STEPS) + f"{seconds:10.1f} s"


def main() -> None:
    """Print the test loss of the untrained network and of both gradient orders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max_steps", type=int, default=2000, help="meta-steps (default: 2000)")
    max_steps = parser.parse_args().max_steps
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    print(f"Test loss after k inner steps, {max_steps} meta-steps")
    print("k =          " + "".join(f"{k:8}" for k in INNER_STEPS) + "    training")
    print("untrained    " + train_and_test(first_order=False, max_steps=0), flush=True)
    print("first order  " + train_and_test(first_order=True, max_steps=max_steps), flush=True)
    print("second order " + train_and_test(first_order=False, max_steps=max_steps))


if __name__ == "__main__":
    main()
