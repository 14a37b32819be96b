"""`maml tradeoff --parallel N`: cells that train side by side, each with its share of the devices."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from maml_pipeline.cli import tradeoff
from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import DEFAULT_ORDERS
from maml_pipeline.locks import is_locked
from maml_pipeline.report.comparison import compare
from maml_pipeline.report.page import write_report
from maml_pipeline.report.printed_table import print_table
from maml_pipeline.signals import SIGNALS
from maml_pipeline.tradeoff import cells, devices, processes
from maml_pipeline.tradeoff.cells import longest_first, meta_steps_done
from maml_pipeline.tradeoff.devices import DeviceShares, Parallel
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import Cell, make_grid
from maml_pipeline.tradeoff.progress_bar import UNKNOWN_TIME, GridProgress
from tests.helpers import (
    CONFIGS,
    Maml,
    assert_same_run,
    make_run,
    maml_command,
    process_environment,
    read_metrics,
)

TOY = ("tradeoff", "--config", CONFIGS / "toy.yaml")
ONE_DEVICE = {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
GPUS = {"accelerator": "auto", "devices": "auto", "num_nodes": 1}


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})


# Whole commands ---------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_number_of_cells_side_by_side_never_changes_a_cell(maml: Maml, tmp_path: Path) -> None:
    grid = (
        *(*TOY, "--orders", "first,second", "--run.checkpoint_every", 50, "--data.test_tasks", 20),
        *("--trainer.max_steps", 600, "--trainer.val_check_interval", 200, "--probes.every", 200),
    )
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert "side by side" not in maml(*grid, "--out", alone)

    # Stopped while both cells train, resumed with another number, and finished with a third command.
    names = ("first-k1-s0", "second-k1-s0")
    command = maml_command(*grid, "--out", together, "--parallel", 2)
    with subprocess.Popen(
        command, env=process_environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 180
        while any(meta_steps_done(together / name) < 20 for name in names):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM in second-k1-s0, first-k1-s0: the same command resumes" in error
    assert not any(child.is_running() for child in children)
    for name in names:
        assert "Stopped after meta-step" in (together / name / "log.txt").read_text()

    printed = maml(*grid, "--out", together, "--parallel", 2)
    assert printed.count("resumes after") == 2
    for name in names:
        assert_same_run(alone / name, together / name)

    # Times say how they were measured; those of cells that trained alone need not.
    assert "Times were measured with up to 2 cells side by side" in printed
    assert "Times were measured" in (together / "report" / "report.html").read_text()
    rows = json.loads((together / "tradeoff.json").read_text())["comparison"]
    assert [row["parallel_cells"] for row in rows] == [2, 2]
    assert "2" in {row["speed/parallel_cells"] for row in read_metrics(together / names[0])}
    assert "speed/parallel_cells" not in read_metrics(alone / names[0])[0]


# The processes of the cells ---------------------------------------------------------------------

TRAINS = """
import os, signal, sys, time
def end(signum, frame):
    print("ended cleanly", flush=True)
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, {handler})
print("trains as", os.getpid(), flush=True)
time.sleep(60)
"""

TRAINS_ALONE_ON_A_DEVICE = """
import fcntl, os, pathlib, sys, time
device = os.environ["CUDA_VISIBLE_DEVICES"]
fcntl.flock(open(device, "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
print(device, os.environ.get("OMP_NUM_THREADS"), flush=True)
time.sleep(0.5)
folder = pathlib.Path(sys.argv[1])
if "-s1" in folder.name:
    sys.exit("no more memory")
(folder / "test.json").touch()
"""


def run_script_in_each_cell(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    def command(grid: Tradeoff, cell: Cell) -> list[str]:
        return [sys.executable, "-c", script, str(grid.folder_of(cell))]

    monkeypatch.setattr(cells, "fit_command", command)


def pids(folder: Path) -> list[int]:
    logs = "".join(log.read_text() for log in folder.glob("*/log.txt"))
    return [int(pid) for pid in re.findall(r"trains as (\d+)\n", logs)]


def exit_status(maml: Maml, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        maml(*arguments)
    return int(stopped.value.code or 0)


@pytest.mark.integration
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_all_running_cells(
    maml: Maml,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
) -> None:
    grid = tmp_path / "grid"

    def watch(folder: Path) -> int:
        if len(pids(grid)) == 3:
            os.kill(os.getpid(), signum)
        return 0

    run_script_in_each_cell(monkeypatch, TRAINS.format(handler="end"))
    monkeypatch.setattr(cells, "meta_steps_done", watch)
    out = ("--out", grid, "--inner_steps", "1,2", "--parallel", 3)
    assert exit_status(maml, *TOY, *out) == 128 + signum
    logs = [log.read_text() for log in grid.glob("*/log.txt")]
    assert len(logs) == 3 and all(log.endswith("ended cleanly\n") for log in logs)
    where = "in checkpointed-k2-s0, second-k2-s0, checkpointed-k1-s0: the same command resumes"
    assert f"stopped by {signal.Signals(signum).name} {where}" in capsys.readouterr().err
    assert not is_locked(grid / ".lock")


@pytest.mark.integration
@pytest.mark.parametrize("slurm_job", [None, "7"])
def test_only_a_slurm_job_kills_cells_that_take_long_to_stop(
    slurm_job: str | None,
    maml: Maml,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = tmp_path / "grid"

    def watch(folder: Path) -> int:
        if len(pids(grid)) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return 0

    validates = "lambda signum, frame: (time.sleep(2), end(signum, frame))"
    run_script_in_each_cell(monkeypatch, TRAINS.format(handler=validates))
    monkeypatch.setattr(cells, "meta_steps_done", watch)
    monkeypatch.setattr(processes, "SECONDS_TO_STOP", 0.5)
    monkeypatch.setenv("SLURM_JOB_ID", slurm_job or "")
    monkeypatch.setenv("PATH", str(tmp_path))  # without scontrol
    assert exit_status(maml, *TOY, "--out", grid, "--orders", "first") == 128 + signal.SIGINT
    error, log = capsys.readouterr().err, (grid / "first-k1-s0" / "log.txt").read_text()
    assert ("ended cleanly" in log) is (slurm_job is None)
    assert "stopped by SIGINT in first-k1-s0: the same command resumes from there" in error
    assert ("from an earlier state in first-k1-s0, killed" in error) is (slurm_job is not None)


@pytest.mark.integration
def test_a_second_ctrl_c_kills_all_running_cells(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tmp_path / "grid"

    def press_ctrl_c_twice() -> None:
        while len(pids(grid)) < 2:
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    run_script_in_each_cell(monkeypatch, TRAINS.format(handler="signal.SIG_IGN"))
    monkeypatch.setattr(cells, "meta_steps_done", lambda _: 0)
    # The command would end this process after a second Ctrl-C.
    monkeypatch.setattr("maml_pipeline.signals.exit_if_interrupted", lambda: None)
    monkeypatch.setattr("maml_pipeline.signals.SECONDS_TO_INTERRUPT", 30.0)
    fingers = threading.Thread(target=press_ctrl_c_twice)
    fingers.start()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        maml(*TOY, "--out", grid, "--parallel", 2)
    fingers.join()
    assert len(pids(grid)) == 2 and not any(map(psutil.pid_exists, pids(grid)))


@pytest.mark.integration
def test_each_cell_has_a_gpu_of_its_own_and_a_failed_one_stops_no_other(
    maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script_in_each_cell(monkeypatch, TRAINS_ALONE_ON_A_DEVICE)
    monkeypatch.setattr(tradeoff, "report_runs", lambda *_: None)  # there are no runs
    monkeypatch.setattr(devices, "uses_gpus", lambda _: True)
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["GPU-a", "GPU-b"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    grid = ("--out", tmp_path / "grid", "--seeds", "0,1,2", "--orders", "first,second")
    error = maml_error(*TOY, *grid, "--parallel", "auto")
    assert error.startswith("maml: error: 2 of 6 cells failed (second-k1-s1, first-k1-s1); the first:")
    assert "no more memory (exit status 1; " in error
    logs = [log.read_text().splitlines()[0] for log in (tmp_path / "grid").glob("*/log.txt")]
    assert {*logs} == {"GPU-a 4", "GPU-b 4"} and len(logs) == 6
    summary = json.loads((tmp_path / "grid" / "tradeoff.json").read_text())
    assert {cell["folder"] for cell in summary["failed"]} == {"first-k1-s1", "second-k1-s1"}


def test_each_seed_starts_with_the_cells_that_take_longest() -> None:
    order = longest_first(make_grid(["first", "second"], [1, 5], [3, 1]))
    assert [cell.name for cell in order][:4] == [
        *("second-k5-s3", "first-k5-s3", "second-k1-s3", "first-k1-s3")
    ]
    assert [cell.seed for cell in order] == [3] * 4 + [1] * 4


# Shares of the devices --------------------------------------------------------------------------


def visible(monkeypatch: pytest.MonkeyPatch, count: int, listed: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)


@pytest.mark.parametrize(
    ("count", "listed", "names"),
    [
        (2, None, ["0", "1"]),
        (2, "3,1", ["3", "1"]),
        (2, " 3 , 1 ", ["3", "1"]),
        (2, "GPU-8932f937,GPU-46abcd12", ["GPU-8932f937", "GPU-46abcd12"]),
        (2, "4,5,99,6", ["4", "5"]),  # CUDA stops at the first that does not exist
        (1, "MIG-5e2f,MIG-77aa,MIG-01bc", ["MIG-5e2f", "MIG-77aa", "MIG-01bc"]),
    ],
)
def test_cells_share_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, count: int, listed: str | None, names: list[str]
) -> None:
    visible(monkeypatch, count, listed)
    numbers: list[Parallel] = ["auto", len(names)]
    for parallel in numbers:
        shares = DeviceShares(parallel, GPUS).environments
        assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == names
    assert "CUDA_VISIBLE_DEVICES" not in DeviceShares(1, GPUS).environments[0]
    with pytest.raises(UserError, match=f"it must be at most {len(names)}"):
        DeviceShares(len(names) + 1, GPUS)


@pytest.mark.parametrize("parallel", [1, 2, 3, 8])
def test_cells_share_the_cores_unless_the_user_sets_the_threads(
    monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shares = DeviceShares(parallel, ONE_DEVICE)
    threads = None if parallel == 1 else str(8 // parallel)
    assert [share.get("OMP_NUM_THREADS") for share in shares.environments] == [threads] * parallel
    assert f"{parallel} side by side, each with {8 // parallel} CPU thread" in str(shares)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    shares = DeviceShares(parallel, ONE_DEVICE)
    assert not any("OMP_NUM_THREADS" in share for share in shares.environments)
    assert "each with OMP_NUM_THREADS=5" in str(shares)


@pytest.mark.parametrize(
    ("parallel", "trainer", "message"),
    [
        (
            9,
            ONE_DEVICE,
            "parallel is 9, but there are 8 CPU cores for this process; it must be at most 8",
        ),
        (3, GPUS, "parallel is 3, but there are 2 visible GPUs"),
        (2, GPUS | {"devices": 2}, "trainer.devices is 2; cells that run side by side have one device"),
        (2, GPUS | {"devices": [1]}, r"trainer.devices is \[1\]"),
        ("auto", GPUS | {"devices": "0,1"}, "trainer.devices is 0,1"),
        (2, ONE_DEVICE | {"num_nodes": 2}, "trainer.num_nodes is 2"),
    ],
)
def test_too_many_cells_are_refused(
    monkeypatch: pytest.MonkeyPatch, parallel: Parallel, trainer: dict[str, object], message: str
) -> None:
    visible(monkeypatch, 2, None)
    with pytest.raises(UserError, match=message):
        DeviceShares(parallel, trainer)


def test_gpus_that_do_not_divide_the_meta_batch_may_have_a_cell_each(
    maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch, 3, None)
    flags = ("--trainer.accelerator", "gpu", "--trainer.devices", "auto", "--data.meta_batch_size", 4)
    sgd = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1)
    assert "to be trained" in maml(*TOY, *flags, *sgd, "--parallel", "auto", "--dry_run")


def test_one_cell_at_a_time_may_have_any_devices() -> None:
    shares = DeviceShares(1, ONE_DEVICE | {"devices": 4, "num_nodes": 2})
    assert shares.environments == [{"MAML_PARALLEL_CELLS": "1"}]
    assert DeviceShares("auto", ONE_DEVICE).number == 1


# Progress ---------------------------------------------------------------------------------------


def test_the_time_left_counts_cells_that_wait_for_another_one() -> None:
    grid = longest_first(make_grid(["first", "second"], [1, 5], [0]))
    now = 0.0
    progress = GridProgress(grid, 100, Console(file=StringIO()), parallel=2, clock=lambda: now)

    def seconds(cell: Cell) -> float:
        return 10 + 2 * cell.relative_cost

    # Costs 16, 6, 4, 2: 42, 22, 18 and 14 seconds. The third starts when the second ends.
    progress.start(grid[0], 0)
    progress.start(grid[1], 0)
    assert progress.time_left() == UNKNOWN_TIME
    now = 10.0
    for cell in grid[:2]:
        progress.update(cell, 1)
    now = 10 + 2 * 4.0
    for cell in grid[:2]:
        progress.update(cell, 1 + int(99 * (now - 10) / (seconds(cell) - 10)))
    left = max(seconds(grid[0]) - now, sum(seconds(cell) for cell in grid[1:]) - now)
    hours, minutes, rest = map(int, progress.time_left().split(":"))
    assert 3600 * hours + 60 * minutes + rest == pytest.approx(left, abs=2)
    now = seconds(grid[1])
    progress.end(grid[1], None)
    progress.start(grid[2], 0)
    now += seconds(grid[2])
    progress.end(grid[2], None)
    progress.start(grid[3], 0)
    # From the two finished cells, exactly.
    assert progress.time_left() == str(timedelta(seconds=round(seconds(grid[3]))))


def test_a_log_has_one_line_for_each_event_and_one_per_minute_for_all_cells() -> None:
    grid = make_grid(["first", "second", "checkpointed"], [1], [0])
    now = 0.0
    out = StringIO()
    progress = GridProgress(grid, 1000, Console(file=out), parallel=2, clock=lambda: now)
    progress.start(grid[0], 0)
    progress.start(grid[1], 250)
    for now in map(float, range(0, 125, 5)):
        for cell in grid[:2]:
            progress.update(cell, 250 + int(now))
    progress.end(grid[1], None)
    progress.start(grid[2], 0)
    first, second, *minutes, ended, last = out.getvalue().splitlines()
    assert first == "[1/3] first-k1-s0: started"
    assert second == "[2/3] second-k1-s0: resumes after 250 meta-steps"
    assert len(minutes) == 2
    pattern = r"first-k1-s0 \d+, second-k1-s0 \d+ of 1,000 meta-steps; \d:\d\d:\d\d left for all cells"
    assert all(re.fullmatch(pattern, minute) for minute in minutes)
    assert ended == "[2/3] second-k1-s0: finished in 0:02:00"
    assert last == "[3/3] checkpointed-k1-s0: started"


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_bar_for_the_grid_and_one_for_each_running_cell(width: int) -> None:
    grid = make_grid(["checkpointed"], [10], list(range(100, 112)))
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    progress = GridProgress(grid, 60_000, console, parallel=2)
    for cell in grid[:2]:
        progress.start(cell, 0)
    progress.update(grid[1], 59_999)
    progress.end(grid[0], None)
    progress.start(grid[2], 30_000)
    console.print(progress.bars)
    lines = out.getvalue().splitlines()[-3:]
    assert all(len(line) == width for line in lines)
    starts = (
        "1 of 12 cells done ",
        "[2/12] checkpointed-k10-s101 59,999/60,000 ",
        "[3/12] checkpointed",
    )
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start) and "━" in line
    assert lines[0].rstrip().endswith("left") and "left" not in lines[1]


# The report -------------------------------------------------------------------------------------


def test_a_report_says_when_times_were_measured_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side_by_side = {"step": 99, "speed/parallel_cells": 4.0}
    damaged = [{"step": 99, "speed/parallel_cells": value} for value in (math.nan, math.inf)]
    histories: list[list[dict[str, float]]] = [[], damaged, [*damaged, side_by_side]]
    for history, shown in zip(histories, (False, False, True), strict=True):
        first, second, _ = DEFAULT_ORDERS
        runs = [make_run(first, 1), make_run(second, 1, history=history)]
        experiments = compare(runs)
        for title, rows in experiments.items():
            print_table(title, rows)
        page = write_report(experiments, tmp_path)
        for text in (capsys.readouterr().out, page.read_text(), (tmp_path / "report.md").read_text()):
            assert ("Times were measured with up to 4 cells side by side" in text) is shown
