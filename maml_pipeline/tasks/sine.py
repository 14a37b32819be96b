"""Sine-wave regression, the first experiment of the MAML paper (Finn et al. 2017, section 5.1)."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from maml_pipeline.limits import check_at_least
from maml_pipeline.tasks.random_generators import random_generators
from maml_pipeline.tasks.task import (
    Split,
    Task,
    TaskBatch,
    TaskDistribution,
    float32_tensors,
)


class SineWaves(TaskDistribution):
    """Regress y = A sin(x - phase) from a few points; a task is an amplitude and a phase.

    The amplitude A is uniform in [0.1, 5], the phase in [0, pi], and x in [-5, 5].

    Args:
        shots: Support points S per task; 5, 10 and 20 in the paper.
        query_shots: Query points Q per task; `None` for as many as shots, as in the paper.

    Shapes: inputs and targets are `(S, 1)` and `(Q, 1)`, float32.

    Raises:
        UserError: A number of points is below 1.

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

    @cached_property
    def name(self) -> str:
        return f"sine-{self.shots}shot"

    def task(self, seed: int, split: Split, index: int) -> Task:
        (task,) = self.batch(seed, split, [index]).tasks()
        return task

    def batch(self, seed: int, split: Split, indices: Sequence[int]) -> TaskBatch:
        """Draw each task from its own generator, then compute all sines at once."""
        uniform = np.empty((len(indices), 2 + self.shots + self.query_shots))
        for row, random in zip(uniform, random_generators(seed, split, indices), strict=True):
            random.random(out=row)
        amplitude, phase = 0.1 + 4.9 * uniform[:, :1], math.pi * uniform[:, 1:2]
        points = -5.0 + 10.0 * uniform[:, 2:]
        values = amplitude * np.sin(points - phase)
        x, y = float32_tensors(self._inputs(points, amplitude, phase), values[..., None])
        return TaskBatch(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])

    def _inputs(self, points: np.ndarray, amplitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
        """Return the inputs `(T, S + Q, features)`; amplitudes and phases are `(T, 1)`."""
        return points[..., None]


class RevealedSineWaves(SineWaves):
    """The same waves, with the amplitude and the phase beside each x: the oracle of the MAML paper.

    Shapes: inputs are `(S, 3)` and `(Q, 3)`, targets `(S, 1)` and `(Q, 1)`, float32.
    """

    @cached_property
    def name(self) -> str:
        return f"sine-{self.shots}shot-oracle"

    def _inputs(self, points: np.ndarray, amplitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
        return np.stack(np.broadcast_arrays(points, amplitude, phase), axis=-1)
