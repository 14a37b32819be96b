"""Laws of the meta-gradient that do not depend on the engine, and the settings of the inner loop."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, Task, TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop, Learn2LearnEngine
from maml_pipeline.meta_gradient.memory import peak_bytes
from maml_pipeline.tasks.lines import ONE_POINT_TASK


def linear_unit(w: float, b: float = 0.0) -> nn.Linear:
    unit = nn.Linear(1, 1)
    with torch.no_grad():
        unit.weight.fill_(w)
        unit.bias.fill_(b)
    return unit


def random_linear_tasks(tasks: int, features: int, generator: torch.Generator) -> list[Task]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [Task(draw(4, features), draw(4, 1), draw(6, features), draw(6, 1)) for _ in range(tasks)]


@pytest.mark.parametrize(
    ("first_order", "w0", "slope"),
    [(True, -1.9347891807556152, -16), (False, -0.7597505450248718, 32)],
)
def test_seed_document_is_reproduced(first_order: bool, w0: float, slope: int) -> None:
    learner = MetaLearner(linear_unit(w0), loss=mse_loss, inner_lr=1.0, first_order=first_order)
    gradient = learner.meta_gradient(TaskBatch.stack([ONE_POINT_TASK]))
    printed = {True: 30.956626892089844, False: -24.312015533447266}[first_order]
    assert gradient["weight"].item() == pytest.approx(printed, rel=2**-22)
    assert gradient["weight"].item() == pytest.approx(slope * w0, rel=2**-22)


@pytest.mark.parametrize("first_order", [True, False])
def test_without_inner_steps_the_orders_are_plain_gradients(first_order: bool) -> None:
    batch = TaskBatch.stack(random_linear_tasks(3, 2, torch.Generator().manual_seed(0)))
    network = nn.Linear(2, 1).double()
    result = Learn2LearnEngine().meta_gradient(network, mse_loss, batch, InnerLoop(0.1, 0, first_order))
    loss = mse_loss(network(batch.query_x), batch.query_y)
    plain = torch.autograd.grad(loss, list(network.parameters()))
    for actual, expected in zip(result.gradient.values(), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_gradient_is_the_mean_over_tasks() -> None:
    tasks = random_linear_tasks(4, 2, torch.Generator().manual_seed(0))
    network, inner = nn.Linear(2, 1).double(), InnerLoop(0.1, 2)
    together = Learn2LearnEngine().meta_gradient(network, mse_loss, TaskBatch.stack(tasks), inner)
    separate = [
        Learn2LearnEngine().meta_gradient(network, mse_loss, TaskBatch.stack([t]), inner) for t in tasks
    ]
    for name, gradient in together.gradient.items():
        mean = torch.stack([s.gradient[name] for s in separate]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-13, atol=1e-15)
    assert together.loss.item() == pytest.approx(sum(s.loss.item() for s in separate) / 4)


@pytest.mark.parametrize("first_order", [True, False])
def test_memory_does_not_grow_with_the_number_of_tasks(first_order: bool) -> None:
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def peak(tasks: int) -> int:
        one = Task(torch.rand(50, 8), torch.rand(50, 1), torch.rand(50, 8), torch.rand(50, 1))
        batch = TaskBatch.stack([one] * tasks)
        inner = InnerLoop(0.1, 3, first_order)
        Learn2LearnEngine().meta_gradient(
            network, mse_loss, batch, inner
        )  # the first call checks the network
        return peak_bytes(lambda: Learn2LearnEngine().meta_gradient(network, mse_loss, batch, inner))

    # A task leaves its losses, a few scalars; one activation takes 12,800 bytes.
    assert peak(2) <= peak(12) <= peak(2) + 10 * 1024


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("inner_lr", {"lr": 0.0}),
        ("inner_lr", {"lr": -0.1}),
        ("inner_lr", {"lr": float("nan")}),
        ("inner_steps", {"lr": 0.1, "steps": -1}),
    ],
)
def test_settings_out_of_range_are_rejected(setting: str, settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=setting):
        InnerLoop(**settings)  # type: ignore[arg-type]
