"""Check an installation: run `maml tradeoff`, the main command, on the toy task.

    python -m scripts.smoke_test        # about a minute on a CPU; writes to runs/smoke-<time>

Exits with an error if a meta-gradient differs from its closed form, or if a method does not at least
halve the test loss of the untrained network.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.cli import main
from maml_pipeline.gradient_order import DEFAULT_ORDERS, GradientOrder
from maml_pipeline.tasks.lines import ONE_POINT_TASK

CONFIG = Path(__file__).parent.parent / "configs" / "toy.yaml"
W0 = -1.0
FIRST, SECOND, CHECKPOINTED = DEFAULT_ORDERS
CLOSED_FORMS = {FIRST: -16 * W0, SECOND: 32 * W0, CHECKPOINTED: 32 * W0}


def one_point_gradient(order: GradientOrder) -> float:
    """Return the meta-gradient of w on the one-point task at w0 = -1, b0 = 0."""
    unit = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(unit.weight, W0)
    torch.nn.init.zeros_(unit.bias)
    learner = MetaLearner(
        unit,
        loss=mse_loss,
        inner_lr=1.0,
        first_order=order.first_order,
        method=order.method.value,
    )
    return learner.meta_gradient(TaskBatch.stack([ONE_POINT_TASK]))["weight"].item()


def test_loss(folder: Path) -> float:
    """Read the test loss of a run."""
    result: dict[str, float] = json.loads((folder / "test.json").read_text())
    return result["test/loss"]


def smoke_test() -> bool:
    """Run the checks, print a table, and return whether all passed."""
    folder = Path("runs") / f"smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    untrained, tradeoff = folder / "untrained", folder / "tradeoff"
    main(["fit", "--config", str(CONFIG), "--run.dir", str(untrained), "--trainer.max_steps", "0"])
    main(["tradeoff", "--config", str(CONFIG), "--out", str(tradeoff)])

    limit = test_loss(untrained) / 2
    passed = True
    print(f"\n{'order':<16}{'test loss':>10}{'required':>12}{'meta-gradient':>16}{'closed form':>14}")
    for order, closed_form in CLOSED_FORMS.items():
        loss, gradient = test_loss(tradeoff / f"{order}-k1-s0"), one_point_gradient(order)
        passed &= loss < limit and gradient == closed_form
        print(f"{order!s:<16}{loss:>10.4f}{f'< {limit:.4f}':>12}{gradient:>16g}{closed_form:>14g}")
    return passed


if __name__ == "__main__":
    if not smoke_test():
        sys.exit("smoke test failed: a test loss or a meta-gradient above is wrong")
    print("Smoke test passed: every order is exact and meta-learns.")
