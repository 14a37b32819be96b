"""The number of devices never changes a run, here on 1, 2 and 4 CPU processes in float64."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import world_size_runs as runs
from tests.helpers import CONFIGS, TIMINGS, maml_command, process_environment, read_metrics
from tests.networks import largest_relative_difference
from tests.ranks import on_every_rank

pytestmark = pytest.mark.integration

WORLDS = (1, 2, 4)
SEVERAL = (2, 4)
CASES = [name for name, _ in runs.cases()]
Worlds = dict[int, list[dict[str, Any]]]
"""The results of every rank, by world size."""
PEAK = "memory/meta_step_peak_bytes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def worlds(folder: Path) -> Worlds:
    """Run every case once per world size."""
    return {n: on_every_rank(runs.train_and_evaluate, n, folder / str(n), seconds=300) for n in WORLDS}


def check_case(worlds: Worlds, name: str) -> None:
    alone: runs.Trained = worlds[1][0][name]
    assert all(value.dtype == torch.float64 for value in alone.weights.values())
    for world_size in SEVERAL:
        for found in worlds[world_size]:
            trained: runs.Trained = found[name]
            assert largest_relative_difference(trained.gradient, alone.gradient) < 1e-12
            assert largest_relative_difference(trained.weights, alone.weights) < 1e-9
            # One all-reduce per meta-step: the networks fit into one DDP bucket.
            by_batch = [0, 1] if "accumulated" in name else [1]
            assert trained.reductions == by_batch * runs.META_STEPS


@pytest.mark.parametrize("name", CASES)
def test_world_size_never_changes_the_meta_gradient_or_the_weights(worlds: Worlds, name: str) -> None:
    check_case(worlds, name)


def test_all_ranks_have_identical_weights(worlds: Worlds) -> None:
    for world_size in SEVERAL:
        first, *others = worlds[world_size]
        for name in CASES:
            for key, value in first[name].weights.items():
                assert all(torch.equal(value, other[name].weights[key]) for other in others)


def test_accumulation_clipping_and_annealing_take_effect(worlds: Worlds) -> None:
    found = worlds[1][0]
    name = "one inner step"
    weights = {way: found[name + way].weights for way in ("", ", accumulated", ", clipped")}
    # Twice 4 tasks are the 8 tasks of a meta-batch, and clipping changes the weights.
    assert largest_relative_difference(weights[", accumulated"], weights[""]) < 1e-9
    assert largest_relative_difference(weights[", clipped"], weights[""]) > 1e-3
    annealed = found["vectorized, annealed"].weights
    for order in ("first", "second"):
        assert largest_relative_difference(annealed, found[f"vectorized, {order} order"].weights) > 1e-6
    assert not any(
        found["vectorized, partly"].gradient[name].any() for name in ("unused", "without_effect")
    )


@pytest.mark.parametrize("engine", ["learn2learn", "vectorized"])
@pytest.mark.parametrize("tasks", runs.EVALUATED)
def test_world_size_never_changes_an_evaluation(worlds: Worlds, engine: str, tasks: int) -> None:
    name = f"{engine}, evaluation of {tasks}"
    expected, whole = worlds[1][0][name]
    assert len(set(whole)) == tasks
    assert all(figure.dtype == torch.float64 for figure in expected.values())
    for world_size in SEVERAL:
        results = [found[name] for found in worlds[world_size]]
        assert sorted(task for _, seen in results for task in seen) == sorted(whole)
        for figures, _ in results:
            assert figures.keys() == expected.keys()
            assert all(
                figures[key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-15)
                for key, value in expected.items()
            )


def rows(folder: Path, world_size: int) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in read_metrics(folder / str(world_size) / "run")
    ]


def test_world_size_never_changes_metrics_csv(worlds: Worlds, folder: Path) -> None:
    alone = rows(folder, 1)
    names = {name for row in alone for name in row}
    # Validation, probes and training loss are all logged.
    assert {"val/loss_ci95", "order_gap/cosine", "speed/meta_step_flops", "train/loss"} <= names
    for world_size in SEVERAL:
        several = rows(folder, world_size)
        assert [row.keys() for row in several] == [row.keys() for row in alone]
        for row, expected in zip(several, alone, strict=True):
            for name in row.keys() - set(TIMINGS):
                if not name.startswith("memory/meta_step"):
                    assert row[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_the_largest_peak_of_all_ranks_is_logged(worlds: Worlds, folder: Path) -> None:
    for world_size in WORLDS:
        logged = [row[PEAK] for row in rows(folder, world_size) if PEAK in row]
        assert len(logged) == 4  # meta-steps 5, 10, 15 and 20
        # The ballast of the last rank is the largest; everything else is small.
        largest = runs.BALLAST * world_size
        assert all(largest < peak < largest + 10**5 for peak in logged)


def test_a_rank_without_memory_for_the_order_gap_stops_no_other(worlds: Worlds) -> None:
    for world_size in WORLDS:
        assert [f["one rank out of memory"] for f in worlds[world_size]] == [
            runs.META_STEPS
        ] * world_size


def test_only_rank_zero_writes(worlds: Worlds, folder: Path) -> None:
    for world_size in WORLDS:
        names = {path.name for path in (folder / str(world_size) / "run").rglob("*")}
        assert names == {"metrics.csv", "checkpoints", "best.ckpt", "last.ckpt"}


def test_devices_that_do_not_divide_the_meta_batch_are_rejected_by_every_rank(worlds: Worlds) -> None:
    for world_size in WORLDS:
        reasons = {found["refused"] for found in worlds[world_size]}
        message = (
            "data.meta_batch_size is 6, which 4 devices do not divide; each device takes an equal share"
        )
        assert reasons == {f"{message} of a meta-step's tasks" if world_size == 4 else ""}


def fit_on(devices: int, folder: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the command, which starts the other ranks itself."""
    wanted = {
        "trainer.devices": devices,
        "trainer.strategy": "ddp",
        "run.dir": folder / "run",
    } | settings
    arguments = [text for key, value in wanted.items() for text in (f"--{key}", value)]
    return subprocess.run(
        maml_command("fit", "--config", CONFIGS / "toy.yaml", *arguments),
        env=process_environment(GLOO_SOCKET_IFNAME="lo", WANDB_MODE="offline"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_command_writes_one_run_on_two_devices(tmp_path: Path) -> None:
    steps = {"trainer.max_steps": 30, "trainer.val_check_interval": 10}
    done = fit_on(2, tmp_path, **steps, **{"data.val_tasks": 1, "data.test_tasks": 9})
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    run = tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list((run / "wandb").glob("*run-*"))) == 1
    assert json.loads((run / "test.json").read_text())["meta_step"] == 30
    table = read_metrics(run)
    validated = [int(row["step"]) for row in table if row["val/loss"]]
    assert validated == [9, 19, 29]
    logged = [int(row["step"]) for row in table if row["train/loss"]]
    assert logged == [9, 19, 29]


def test_devices_that_do_not_divide_the_meta_batch_are_rejected_without_a_traceback(
    tmp_path: Path,
) -> None:
    done = fit_on(3, tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1  # and no traceback; a machine of fewer cores says so first
    assert errors[0].endswith(
        "data.meta_batch_size is 8, which 3 devices do not divide; each device takes an equal share of "
        "a meta-step's tasks"
    )
    assert not list(tmp_path.iterdir())  # no process was started, no folder made
