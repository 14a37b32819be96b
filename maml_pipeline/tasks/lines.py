"""Regression of lines, the toy task: its meta-gradients are known in closed form."""

from functools import cached_property

import torch

from maml_pipeline.limits import check_at_least
from maml_pipeline.tasks.random_generators import random_generator
from maml_pipeline.tasks.task import Split, Task, TaskDistribution, float32_tensors

ONE_POINT_TASK = Task(
    support_x=torch.tensor([[1.0]]),
    support_y=torch.tensor([[0.0]]),
    query_x=torch.tensor([[2.0]]),
    query_y=torch.tensor([[0.0]]),
)
"""One support point (1, 0) and one query point (2, 0).

For y = w x + b with squared error, b0 = 0 and an inner learning rate of 1, the meta-gradient of w is
-16 w0 in first order and 32 w0 in second order.
"""


class Lines(TaskDistribution):
    """Regress y = a x + b from a few points; a task is a slope and an intercept.

    The slope a is uniform in [1, 3], the intercept b in [-1, 1], and x in [-2, 2]. An initialisation
    near a = 2, b = 0 adapts best: this is what meta-learning should find.

    Args:
        shots: Support points S per task.
        query_shots: Query points Q per task.

    Shapes: inputs and targets are `(S, 1)` and `(Q, 1)`, float32.

    Raises:
        UserError: A number of points is below 1.
    """

    def __init__(self, shots: int = 5, query_shots: int = 10) -> None:
        check_at_least("shots", shots, 1)
        check_at_least("query_shots", query_shots, 1)
        self.shots = shots
        self.query_shots = query_shots

    @cached_property
    def name(self) -> str:
        """`toy`, for any number of points."""
        return "toy"

    def task(self, seed: int, split: Split, index: int) -> Task:
        random = random_generator(seed, split, index)
        slope, intercept = random.uniform(1, 3), random.uniform(-1, 1)
        points = random.uniform(-2, 2, size=(self.shots + self.query_shots, 1))
        x, y = float32_tensors(points, slope * points + intercept)
        return Task(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])
