"""Train, save and load a learner, adapt it to a new task, and predict, from Python.

python examples/adapt.py                                    # seconds on a CPU
python examples/adapt.py --run runs/sine-10shot-second-s0   # after `maml fit --config sine`
"""

import argparse
import logging
import tempfile
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import SineWaves


def train(checkpoint: Path, max_steps: int) -> None:
    """Meta-train an MLP on sine waves, and save it."""
    torch.manual_seed(0)  # the initial parameters
    learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, engine="vectorized")
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(learner, datamodule=TaskDataModule(SineWaves(shots=10), meta_batch_size=25))
    trainer.save_checkpoint(checkpoint)


def main() -> None:
    """Adapt to ten points of a new sine wave, and print the error after each number of inner steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run on sine waves (default: train here)")
    parser.add_argument("--max_steps", type=int, default=2000, help="meta-steps (default: 2000)")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    if arguments.run is not None:
        learner = MetaLearner.from_run(arguments.run)
    else:
        with tempfile.TemporaryDirectory() as folder:
            train(Path(folder, "sine.ckpt"), arguments.max_steps)
            learner = MetaLearner.load_from_checkpoint(
                Path(folder, "sine.ckpt"), network=MLP(), loss=mse_loss, inner_lr=0.01
            )

    # Any tensors would do: inputs (S, 1) and targets (S, 1).
    wave = SineWaves(shots=10, query_shots=1000).task(seed=0, split="test", index=0)
    print("Mean squared error on a new sine wave after k inner steps")
    for steps in (0, 1, 5, 10):
        model = learner.adapt(wave.support_x, wave.support_y, steps=steps)
        with torch.no_grad():
            prediction = model(wave.query_x)
        print(f"k = {steps:2}   {mse_loss(prediction, wave.query_y):.3f}")


if __name__ == "__main__":
    main()
