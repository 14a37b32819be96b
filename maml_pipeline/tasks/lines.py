"""The toy: one linear unit, where the meta-gradient can be written down by hand."""

from functools import cached_property

import torch

from maml_pipeline.tasks.task import (
    Split,
    Task,
    TaskDistribution,
    check_at_least,
    float32_tensors,
    random_generator,
)

# One support point (1, 0), one query point (2, 0). From b0 = 0 and with both learning rates 1,
# the first-order meta-gradient of w is -16 w0 and the second-order one +32 w0.
ONE_POINT_TASK = Task(
    support_x=torch.tensor([[1.0]]),
    support_y=torch.tensor([[0.0]]),
    query_x=torch.tensor([[2.0]]),
    query_y=torch.tensor([[0.0]]),
)


class Lines(TaskDistribution):
    """Regress y = a x + b from a few points; a task is a slope and an intercept.

    a is uniform in [1, 3], b uniform in [-1, 1] and x uniform in [-2, 2]: an initialisation near
    a = 2, b = 0 adapts best, so meta-learning has something to find.

    Args:
        shots: Support points S of a task.
        query_shots: Query points Q of a task.

    Shapes: inputs and targets are `(S, 1)` and `(Q, 1)`, float32.
    """

    def __init__(self, shots: int = 5, query_shots: int = 10) -> None:
        check_at_least("shots", shots, 1)
        check_at_least("query_shots", query_shots, 1)
        self.shots = shots
        self.query_shots = query_shots

    @cached_property
    def name(self) -> str:
        """The toy, however many points a task has."""
        return "toy"

    def task(self, seed: int, split: Split, index: int) -> Task:
        random = random_generator(seed, split, index)
        slope, intercept = random.uniform(1, 3), random.uniform(-1, 1)
        points = random.uniform(-2, 2, size=(self.shots + self.query_shots, 1))
        x, y = float32_tensors(points, slope * points + intercept)
        return Task(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])
