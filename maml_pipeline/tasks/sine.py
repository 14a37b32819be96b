"""Sine-wave regression, the first experiment of the MAML paper."""

import math

import numpy as np

from maml_pipeline.tasks.task import (
    Split,
    Task,
    TaskDistribution,
    check_at_least,
    random_generator,
    to_float32,
)


class SineWaves(TaskDistribution):
    """Regress y = A sin(x - phase) from K points; a task is an amplitude and a phase.

    A is uniform in [0.1, 5], the phase uniform in [0, pi], x uniform in [-5, 5].

    Args:
        shots: Support points K of a task; 5, 10 and 20 in the paper.
        query_shots: Query points of a task; `None` for as many as there are shots, as in the paper.

    Shapes: inputs and targets are `(K, 1)`, float32.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, section 5.1.
    """

    def __init__(self, shots: int = 10, query_shots: int | None = None) -> None:
        query_shots = shots if query_shots is None else query_shots
        check_at_least("shots", shots, 1)
        check_at_least("query_shots", query_shots, 1)
        self.shots = shots
        self.query_shots = query_shots

    def task(self, seed: int, split: Split, index: int) -> Task:
        random = random_generator(seed, split, index)
        amplitude, phase = random.uniform(0.1, 5.0), random.uniform(0.0, math.pi)
        points = random.uniform(-5.0, 5.0, size=(self.shots + self.query_shots, 1))
        x, y = to_float32(points, amplitude * np.sin(points - phase))
        return Task(x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :])
