"""The main job in miniature: `maml tradeoff` on the toy task, which is what a person runs at scale.

Exits with a status other than 0 when a meta-gradient is not its closed form, or when a gradient order
does not at least halve the test loss of the untrained network.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.cli import main
from maml_pipeline.tasks.lines import ONE_POINT_TASK

CONFIG = Path(__file__).parent.parent / "configs" / "toy.yaml"
W0 = -1.0
CLOSED_FORMS = {"first": -16 * W0, "second": 32 * W0, "checkpointed": 32 * W0}


def one_point_gradient(order: str) -> float:
    """Return the meta-gradient of w on the one-point task from w0 = -1, b0 = 0."""
    unit = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(unit.weight, W0)
    torch.nn.init.zeros_(unit.bias)
    learner = MetaLearner(
        unit,
        loss=mse_loss,
        inner_lr=1.0,
        first_order=order == "first",
        checkpoint_inner_steps=order == "checkpointed",
    )
    return learner.meta_gradient(TaskBatch.stack([ONE_POINT_TASK]))["weight"].item()


def test_loss(folder: Path) -> float:
    """Return what a run came to."""
    result: dict[str, float] = json.loads((folder / "test.json").read_text())
    return result["test/loss"]


def smoke_test() -> bool:
    """Run everything, and tell whether all is as it must be."""
    folder = Path("runs") / f"smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    gradients = {order: one_point_gradient(order) for order in CLOSED_FORMS}
    main(
        ["fit", "--config", str(CONFIG), "--run.dir", f"{folder}/untrained", "--trainer.max_steps", "0"]
    )
    main(["tradeoff", "--config", str(CONFIG), "--out", str(folder / "tradeoff")])

    untrained = test_loss(folder / "untrained")
    trained = {order: test_loss(folder / "tradeoff" / f"{order}-k1-s0") for order in CLOSED_FORMS}
    print(f"\nUntrained, the test loss is {untrained:.4f}.")
    for order, expected in CLOSED_FORMS.items():
        print(
            f"{order}: test loss {trained[order]:.4f}; meta-gradient on one point "
            f"{gradients[order]:+g}, its closed form {expected:+g}"
        )
    return gradients == CLOSED_FORMS and all(loss < untrained / 2 for loss in trained.values())


if __name__ == "__main__":
    if not smoke_test():
        sys.exit("smoke test: a figure above is not what it must be")
    print("Smoke test passed: every gradient order is exact and meta-learns.")
