"""`maml tradeoff` trains every cell once, even after kills, stops and failures."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor, nn

from maml_pipeline.runs.locked_folder import lock_run_folder
from maml_pipeline.slurm.queue import Job
from maml_pipeline.tradeoff.cells import meta_steps_done
from maml_pipeline.tradeoff.grid import Cell, make_grid
from maml_pipeline.tradeoff.progress_bar import UNKNOWN_TIME, GridProgress
from tests.helpers import CONFIGS, ROOT, Maml, locked_by_another_process, maml_command

TOY = ("tradeoff", "--config", CONFIGS / "toy.yaml")
SHORT = ("--trainer.max_steps", 40, "--trainer.val_check_interval", 20, "--data.test_tasks", 20)


@pytest.fixture(autouse=True)
def _cells_can_import_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Dropout(nn.Module):
    """A network with dropout, which checkpointed inner steps reject."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.layers(x)
        return prediction


# Training ---------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_killed_tradeoff_resumes(maml: Maml, tmp_path: Path) -> None:
    grid = (*TOY, "--orders", "first,second", "--run.checkpoint_every", 50, "--data.test_tasks", 20)
    long = (*grid, "--trainer.max_steps", 1500, "--trainer.val_check_interval", 500)
    command = maml_command(*long)
    folder = tmp_path / "runs" / "toy-tradeoff"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 180
        while meta_steps_done(folder / "second-k1-s0") < 100 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    killed_at = meta_steps_done(folder / "second-k1-s0")
    assert 100 <= killed_at < 1500
    finished = (folder / "first-k1-s0" / "test.json").stat().st_mtime_ns

    printed = maml(*long)
    assert "2 cells, 1 finished" in printed and "resumes after" in printed
    assert (folder / "first-k1-s0" / "test.json").stat().st_mtime_ns == finished
    log = (folder / "second-k1-s0" / "log.txt").read_text()
    assert log.count("Run folder:") == 2

    # A killed and resumed cell equals `maml fit` with the same settings.
    fit = ("fit", *long[1:3], *long[5:], "--run.dir", tmp_path / "alone")
    maml(*fit, "--trainer.enable_progress_bar", "false")
    alone, cell = (json.loads((path / "test.json").read_text()) for path in (
        tmp_path / "alone", folder / "second-k1-s0"
    ))  # fmt: skip
    assert alone == cell

    summary = json.loads((folder / "tradeoff.json").read_text())
    assert [row["order"] for row in summary["comparison"]] == ["first", "second"]
    assert [cell["folder"] for cell in summary["cells"]] == ["first-k1-s0", "second-k1-s0"]
    assert summary["failed"] == []
    for row in summary["comparison"]:
        assert f"{row['mean']:.4f} ± {row['ci95']:.4f}" in printed
    assert {"report.html", "report.md", "overview.png"} <= {p.name for p in folder.glob("report/*")}
    # Nothing is left to do.
    assert "2 cells, 2 finished" in maml(*long)


@pytest.mark.integration
def test_a_failed_cell_is_reported_and_does_not_stop_the_others(
    maml_error: Callable[..., str], tmp_path: Path
) -> None:
    network = ("--model.network", "tests.test_tradeoff.Dropout", "--model.engine", "learn2learn")
    grid = ("--orders", "checkpointed,first", "--out", tmp_path / "grid")
    error = maml_error(*TOY, *SHORT, *network, *grid)
    assert "1 of 2 cells failed (checkpointed-k1-s0); the first:" in error
    assert "set method to unrolled" in error
    assert (tmp_path / "grid" / "first-k1-s0" / "test.json").exists()
    (failed,) = json.loads((tmp_path / "grid" / "tradeoff.json").read_text())["failed"]
    assert failed["folder"] == "checkpointed-k1-s0" and "log.txt" in failed["reason"]


@pytest.mark.integration
def test_a_signal_stops_the_current_cell_with_its_state_saved(tmp_path: Path) -> None:
    long = ("--trainer.max_steps", 100_000, "--out", tmp_path / "grid")
    command = maml_command(*TOY, "--orders", "first", *long)
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        cell = tmp_path / "grid" / "first-k1-s0"
        deadline = time.monotonic() + 180
        while meta_steps_done(cell) < 50 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM in first-k1-s0: the same command resumes from there" in error
    assert "Stopped after meta-step" in (cell / "log.txt").read_text()
    assert (cell / "checkpoints" / "last.ckpt").exists()


# Before anything is trained ---------------------------------------------------------------------


def test_a_dry_run_lists_the_cells_and_leaves_nothing(maml: Maml, tmp_path: Path) -> None:
    printed = maml(*TOY, "--seeds", "0,1", "--inner_steps", "1,2", "--dry_run")
    lines = printed.strip().splitlines()
    assert len(lines) == 12 and all(line.endswith(": to be trained") for line in lines)
    assert lines[0].startswith("runs/toy-tradeoff/first-k1-s0")
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_tells_how_far_a_stopped_cell_is(maml: Maml, tmp_path: Path) -> None:
    cell = tmp_path / "grid" / "first-k1-s0"
    cell.mkdir(parents=True)
    (cell / "metrics.csv").write_text("step,train/loss\n9,1.0\n")
    printed = maml(*TOY, "--orders", "first,second", "--out", "grid", "--dry_run")
    assert printed.splitlines() == [
        "grid/first-k1-s0: resumes after about 10 meta-steps",
        "grid/second-k1-s0: to be trained",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--orders", "first,third"],
            "orders contains third; choose from first, truncated-N, second, checkpointed, hessian-free",
        ),
        (["--seeds", "0,0"], "seeds has 0 more than once"),
        (["--inner_steps", "1,-1"], "inner_steps has -1; each must be 0 or more"),
        (["--inner_steps", "many"], "--inner_steps: 'many' must be a whole number"),
        (["--model.first_order", "true"], "--model.first_order is set by the trade-off for each cell"),
        (["--seed_everything", "1"], "use --seeds"),
        (["--ckpt_path", "last"], "--ckpt_path is not used here"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps is -1"),
        (["--model.inner_rate", "1"], "model.inner_rate"),
        (["--out", "/dev/null/grid"], "out /dev/null/grid cannot be created"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    assert message in maml_error(*TOY, *arguments)
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_in_a_config_is_refused(maml_error: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "start.yaml").write_text("ckpt_path: last\n")
    error = maml_error(*TOY, "--config", tmp_path / "start.yaml", "--dry_run")
    assert "--ckpt_path is not used here: the same command resumes" in error


@pytest.mark.integration
def test_a_folder_holds_one_tradeoff(maml: Maml, maml_error: Callable[..., str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "grid", "--orders", "first")
    maml(*TOY, *SHORT, *out)
    error = maml_error(*TOY, *SHORT, *out, "--model.inner_lr", 0.5)
    assert "holds a trade-off in which model.inner_lr is 0.1, not 0.5" in error
    with locked_by_another_process(tmp_path / "grid" / ".lock"):
        assert "is in use" in maml_error(*TOY, *SHORT, *out)


def test_a_report_needs_none_of_the_devices_that_its_cells_train_on(maml: Maml, tmp_path: Path) -> None:
    # As in the report's Slurm job, which requests no GPU.
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "config.yaml").write_text("{}")
    on_gpu = (*TOY, "--trainer.accelerator", "gpu", "--orders", "first", "--out", "grid")
    assert "1 cell is not finished" in maml(*on_gpu, "--report")


@pytest.mark.integration
def test_one_process_at_a_time_trains_a_cell(tmp_path: Path) -> None:
    cell = tmp_path / "grid" / "first-k1-s0"
    cell.mkdir(parents=True)
    one_cell = ("--orders", "first", "--out", tmp_path / "grid", "--cell", 0)
    command = maml_command(*TOY, *SHORT, *one_cell)
    with lock_run_folder(cell):
        refused = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert refused.returncode == 1
    assert f"{cell} is in use: another process is training in it" in (cell / "log.txt").read_text()
    assert {path.name for path in cell.iterdir()} <= {"log.txt", ".lock", "checkpoints"}
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert (cell / "test.json").exists()


def test_the_grid_is_ordered_by_seed_and_has_no_duplicates() -> None:
    grid = make_grid(["first", "second"], [1, 5], [0, 1])
    assert len({cell.name for cell in grid}) == len(grid) == 8
    assert [cell.seed for cell in grid] == [0] * 4 + [1] * 4


# The report without training ---------------------------------------------------------------------


def write_cell(grid: Path, name: str, log: str) -> Path:
    """Write what a cell that was started once has in its folder, and return the folder."""
    cell = grid / name
    cell.mkdir(parents=True)
    for file, text in (("config.yaml", "run: {}\n"), ("log.txt", log)):
        (cell / file).write_text(text)
    return cell


def test_a_report_calls_only_failed_and_stopped_cells_failed(
    maml: Maml, maml_error: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tmp_path / "grid"
    earlier, attempt = "Run folder: grid\nmaml: error: no memory\n", "\nRun folder: grid\n"
    running = write_cell(grid, "first-k1-s0", earlier + attempt)
    queued = write_cell(grid, "second-k1-s0", earlier)
    (grid / "second-k2-s0").mkdir()
    (grid / "second-k2-s0" / "log.txt").touch()  # just starting
    (grid / "config.yaml").touch()
    jobs = {queued: Job("7_1", "PENDING")}
    monkeypatch.setattr("maml_pipeline.tradeoff.cells.jobs_of", lambda _: jobs)
    command = (*TOY, "--orders", "first,second", "--out", grid, "--report")
    with lock_run_folder(running):
        printed = maml(*command, "--inner_steps", "1,2")
        assert printed.strip() == "4 cells are not finished"
        assert json.loads((grid / "tradeoff.json").read_text())["failed"] == []

    jobs.clear()
    (running / "log.txt").write_text(earlier + attempt)
    (queued / "log.txt").write_text(f"{earlier}{attempt}maml: error: a full disk\n")
    error = maml_error(*command, "--inner_steps", "1")
    assert "2 of 2 cells failed (first-k1-s0, second-k1-s0); the first: it was stopped (" in error
    stopped, failed = json.loads((grid / "tradeoff.json").read_text())["failed"]
    assert stopped["reason"] == f"it was stopped ({running / 'log.txt'})"
    assert failed["reason"] == f"a full disk ({queued / 'log.txt'})"


# Progress ---------------------------------------------------------------------------------------


def test_the_time_left_is_exact_where_time_is_affine_in_the_work() -> None:
    grid = make_grid(["first", "second"], [1, 5], [0])
    clock = count(0, 0)
    now = [0.0]
    out = StringIO()
    progress = GridProgress(grid, 100, Console(file=out), clock=lambda: now[0] + next(clock))

    def seconds(cell: Cell) -> float:
        return 10 + 2 * cell.relative_cost

    for cell in grid[:2]:
        progress.start(cell, 0)
        now[0] += seconds(cell)
        progress.end(cell, None)
    progress.start(grid[2], 0)
    now[0] += seconds(grid[2]) / 2
    progress.update(grid[2], 50)
    left = sum(map(seconds, grid[2:])) - seconds(grid[2]) / 2
    hours, minutes, rest = map(int, progress.time_left().split(":"))
    assert 3600 * hours + 60 * minutes + rest == round(left)
    assert "[3/4] first-k5-s0: started" in out.getvalue()


def test_the_time_left_does_not_count_startup_as_training() -> None:
    grid = make_grid(["first", "second"], [1], [0])
    now = 0.0
    progress = GridProgress(grid, 100, Console(file=StringIO()), clock=lambda: now)
    progress.start(grid[0], 0)
    assert progress.time_left() == UNKNOWN_TIME
    now = 35.0  # start-up
    progress.update(grid[0], 1)
    assert progress.time_left() == UNKNOWN_TIME
    now = 45.0
    progress.update(grid[0], 11)
    first, second = 89, 35 + 100 * grid[1].relative_cost / grid[0].relative_cost
    assert progress.time_left() == str(timedelta(seconds=round(first + second)))
    now = 47.0  # it counts down between two updates
    progress.update(grid[0], 11)
    assert progress.time_left() == str(timedelta(seconds=round(first - 2 + second)))


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_on_one_line(width: int) -> None:
    cells = make_grid(["checkpointed"], [10], list(range(100, 112)))
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    progress = GridProgress(cells, 60_000, console)
    progress.start(cells[0], 0)
    progress.update(cells[0], 59_999)
    console.print(progress.bars)
    line = out.getvalue().splitlines()[-1]
    assert len(line) == width
    assert line.startswith("[1/12] checkpointed-k10-s100 59,999/60,000 ━")
    assert line.endswith(f"8% {UNKNOWN_TIME} left")
