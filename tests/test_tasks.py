"""Tasks are pure functions of (seed, split, index), and follow the papers."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from maml_pipeline import TaskBatch, TaskDistribution
from maml_pipeline.errors import UserError
from maml_pipeline.tasks import Lines, Omniglot, RevealedSineWaves, SineWaves
from maml_pipeline.tasks.task import SPLITS

DISTRIBUTIONS: list[Callable[[], TaskDistribution]] = [Lines, SineWaves, RevealedSineWaves]


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("make", DISTRIBUTIONS)
def test_a_task_depends_on_seed_split_and_index_only(make: Callable[[], TaskDistribution]) -> None:
    numbers = list(product((0, 1), SPLITS, (0, 1, 10**12)))
    forwards = {n: make().task(*n) for n in numbers}
    torch.manual_seed(1)
    np.random.seed(1)
    backwards = {n: make().task(*n) for n in reversed(numbers)}
    assert all(same(forwards[n], backwards[n]) for n in numbers)
    for a, b in product(numbers, numbers):
        assert same(forwards[a], forwards[b]) == (a == b)


@pytest.mark.parametrize("make", DISTRIBUTIONS)
def test_a_batch_equals_its_stacked_tasks(make: Callable[[], TaskDistribution]) -> None:
    tasks, indices = make(), [7, 3, 100]
    batch = tasks.batch(5, "val", indices)
    assert same(batch, TaskBatch.stack(tasks.task(5, "val", i) for i in indices))
    for task, index in zip(batch.tasks(), indices, strict=True):
        assert same(task, tasks.task(5, "val", index))


@pytest.mark.parametrize("shots", [5, 10, 20])
def test_sine_waves_match_the_paper(shots: int) -> None:
    waves = SineWaves(shots)
    amplitudes, phases, xs = [], [], []
    for index in range(300):
        task = waves.task(0, "train", index)
        assert task.support_x.shape == task.query_x.shape == (shots, 1)
        x = torch.cat([task.support_x, task.query_x]).double()
        y = torch.cat([task.support_y, task.query_y]).double()
        # A sin(x - phase) = A cos(phase) sin x - A sin(phase) cos x is linear in two unknowns.
        design = torch.cat([x.sin(), -x.cos()], dim=1)
        solution = torch.linalg.lstsq(design, y).solution.squeeze(1)
        torch.testing.assert_close(design @ solution[:, None], y, atol=1e-5, rtol=0)
        amplitudes.append(solution.norm().item())
        phases.append(math.atan2(solution[1].item(), solution[0].item()))
        xs.append(x)
    assert 0.1 <= min(amplitudes) < 0.3 and 4.8 < max(amplitudes) <= 5.0 + 1e-3
    assert -1e-3 <= min(phases) < 0.1 and math.pi - 0.1 < max(phases) <= math.pi + 1e-3
    assert -5 <= min(x.min().item() for x in xs) < -4.9 < 4.9 < max(x.max().item() for x in xs) <= 5


def test_an_oracle_sees_the_amplitude_and_phase_of_the_same_waves() -> None:
    plain, oracle = SineWaves(shots=4), RevealedSineWaves(shots=4)
    expected, revealed = (waves.batch(3, "test", range(6)) for waves in (plain, oracle))
    assert plain.name == "sine-4shot" and oracle.name == "sine-4shot-oracle"
    for x, y, with_wave in (
        (expected.support_x, expected.support_y, revealed.support_x),
        (expected.query_x, expected.query_y, revealed.query_x),
    ):
        points, amplitude, phase = with_wave.unbind(-1)
        assert torch.equal(points[..., None], x)
        torch.testing.assert_close(
            (amplitude * (points - phase).sin())[..., None], y, rtol=1e-5, atol=1e-5
        )
    assert torch.equal(revealed.query_y, expected.query_y)


def test_points_lie_on_a_line() -> None:
    task = Lines(shots=3, query_shots=4).task(0, "train", 0)
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    slopes = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-3, atol=0)
    assert (len(task.support_x), len(task.query_x)) == (3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SineWaves(shots=0), "shots is 0"),
        (lambda: SineWaves(query_shots=-1), "query_shots is -1"),
        (lambda: Lines(shots=0), "shots is 0"),
        (lambda: Omniglot(ways=101), "ways is 101; it must be at most 100, the number of characters in"),
        (lambda: Omniglot(ways=1), "ways is 1; it must be at least 2"),
        (lambda: Omniglot(shots=10, query_shots=11), "10 [+] 11 = 21; it must be at most 20"),
    ],
)
def test_settings_out_of_range_are_rejected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
