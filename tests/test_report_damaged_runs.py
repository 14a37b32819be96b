"""`maml report` reports valid runs, and gives one line with the reason for each skipped one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from maml_pipeline.cli import main
from maml_pipeline.errors import UserError
from maml_pipeline.report.comparison import compare
from maml_pipeline.report.page import write_report
from maml_pipeline.report.table import seeds_text
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.summary import summarize
from tests.damaged_runs import LEFT_OUT, REPORTED
from tests.run_copies import (
    BINARY,
    config,
    copy_run,
    each,
    edit,
    metric,
    remove,
    result,
    sparse,
    write,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def sound(trained_runs: Path) -> list[Path]:
    return [trained_runs / "lines" / name for name in ("first-k1-s0", "second-k1-s0")]


@pytest.mark.parametrize(
    "name",
    [
        # W&B's own reader is a process.
        pytest.param(name, marks=pytest.mark.integration) if name.startswith("log-") else name
        for name in LEFT_OUT
    ],
)
def test_a_damaged_run_is_skipped_with_a_reason(name: str, sound: list[Path], tmp_path: Path) -> None:
    damage, reason = LEFT_OUT[name]
    copy_run(sound[0], tmp_path / name, damage)
    found = find_runs([*sound, tmp_path])
    assert [run.source for run in found.runs] == sound
    (line,) = found.skipped
    assert name in line and reason in line and line.isprintable() and len(line) < 600
    with pytest.raises(UserError) as error:
        find_runs([tmp_path])
    assert str(error.value) == f"there is no run to show: {line}"


@pytest.mark.parametrize("name", REPORTED)
def test_an_unusual_but_valid_run_is_reported(name: str, sound: list[Path], tmp_path: Path) -> None:
    odd = copy_run(sound[0], tmp_path / name, REPORTED[name])
    found = find_runs([*sound, tmp_path])
    assert {run.source for run in found.runs} == {*sound, odd} and found.skipped == []


def test_damaged_and_valid_runs_share_one_report(
    sound: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(LEFT_OUT) >= 74
    monkeypatch.chdir(tmp_path)
    for name, (damage, _) in LEFT_OUT.items():
        copy_run(sound[0], Path("runs/left") / name, damage)
    for seed, (name, odd) in enumerate(REPORTED.items(), 20):
        copy_run(sound[0], Path("runs/odd") / name, odd, seed)
    for run in sound:
        shutil.copytree(run, Path("runs") / run.name)

    main(["report", "runs"])  # which returns: exit status 0
    printed, page = capsys.readouterr(), Path("report/report.html").read_text()
    reported = [f"runs/{run.name}" for run in sound] + [f"runs/odd/{name}" for name in REPORTED]
    for folder in reported:
        assert folder in printed.out and f">{folder}</td>" in page and folder not in printed.err
    lines = printed.err.splitlines()
    assert len(lines) == len(LEFT_OUT) and all(line.startswith("Left out: runs/left/") for line in lines)
    for name, (_, reason) in LEFT_OUT.items():
        assert len([line for line in lines if f"runs/left/{name}" in line and reason in line]) >= 1
    assert f"{len(LEFT_OUT)} left out" in page


# Copies, repeats and unfinished runs -------------------------------------------------------------


def test_a_copy_of_a_run_is_skipped(sound: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sound[0], run)
    shutil.copytree(run, tmp_path / "copy")
    shutil.copytree(run / "wandb", tmp_path / "log" / "wandb")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "loop").symlink_to(tmp_path)
    summary = [summarize(found) for found in find_runs([run]).runs]
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "tradeoff.json").write_text(json.dumps({"cells": summary}))
    # An earlier state of the run.
    shutil.copytree(run, tmp_path / "earlier")
    (tmp_path / "earlier" / "test.json").unlink()
    edit("metrics.csv", lambda text: "".join(text.splitlines(keepends=True)[:8]))(tmp_path / "earlier")

    found = find_runs([tmp_path])
    (one,) = found.runs
    assert one.is_finished and one.source in (run, tmp_path / "copy", tmp_path / "link")
    assert len(found.skipped) == 4
    assert all(f"it is a copy of {one.source}" in line for line in found.skipped)
    for paths in ([run, tmp_path / "link"], [tmp_path / "link"], [run, run / "metrics.csv" / ".."]):
        assert len(find_runs(paths).runs) == 1


def test_a_repeated_run_is_not_another_seed(sound: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(sound[0], again)
    metric(2, "speed/meta_step_ms", "1.5")(again)  # a repeated run has other timings
    found = find_runs([*sound, tmp_path])
    assert len(found.runs) == 3 and found.skipped == []
    groups = compare(found.runs)
    assert [*groups] == ["toy", "toy, repeat 2"]
    assert all(
        len(row.runs) == 1 and row.result_range is None for rows in groups.values() for row in rows
    )


def test_a_killed_run_does_not_count_as_a_seed(sound: list[Path], tmp_path: Path) -> None:
    copy_run(sound[0], tmp_path / "second-seed", seed=1)
    copy_run(sound[0], tmp_path / "killed", remove("test.json"), seed=2)
    (row,) = compare(find_runs([sound[0], tmp_path]).runs)["toy"]
    assert [run.seed for run in row.evaluated] == [0, 1] and [run.seed for run in row.unfinished] == [2]
    assert seeds_text(row) == "0, 1, 2*"
    official = [run.test["test/loss"] for run in row.evaluated]
    assert row.result is not None and row.result.mean == pytest.approx(sum(official) / 2)
    assert row.result_range == (min(official), max(official))
    assert (row.to_json()["seeds"], row.to_json()["unfinished_seeds"]) == ([0, 1], [2])


def test_a_log_of_a_starting_run_is_not_a_run(sound: list[Path], tmp_path: Path) -> None:
    starting = copy_run(
        sound[0], tmp_path / "starting", each(remove("metrics.csv"), remove("test.json"))
    )
    assert [*starting.glob("wandb/*/run-*.wandb")]
    found = find_runs([sound[0], starting])
    assert [run.source for run in found.runs] == [sound[0]]
    assert len(found.skipped) == 1 and "just starting" in found.skipped[0]


def test_other_measurements_are_not_the_result(sound: list[Path], tmp_path: Path) -> None:
    run = copy_run(sound[0], tmp_path / "run")
    before = find_runs([run]).runs[0].result
    for name in ("test-2.json", "test.best.json", "validate.json", "val.json"):
        write(name, json.dumps({"test/loss": 9.0}))(run)
    assert find_runs([run]).runs[0].result == before


def test_a_tradeoff_whose_own_config_is_damaged_is_reported(sound: list[Path], tmp_path: Path) -> None:
    for run in sound:
        shutil.copytree(run, tmp_path / run.name)
    for content in (b"", b"[1", BINARY):
        write("config.yaml", content)(tmp_path)
        write("tradeoff.json", content)(tmp_path)
        found = find_runs([tmp_path])
        assert len(found.runs) == 2 and found.skipped == []


def test_a_metric_named_after_a_step_is_a_metric(sound: list[Path], tmp_path: Path) -> None:
    run = copy_run(sound[0], tmp_path / "run", config("run.monitor", "val/my_step_size"))
    result(my_step_size=0.5, my_step_size_step_0=0.7, my_step_size_step_1=0.6)(run)
    (found,) = find_runs([run]).runs
    assert found.measure_at_test == ("my_step_size", None) and len(found.test_curve) == 2
    write_report(compare([found]), tmp_path / "report")


# Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "RUN_DIR: it is empty; name a folder or a file"),
        ("nowhere", "nowhere: it does not exist"),
        ("/proc/self/mem", "mem cannot be read"),
        ("/dev/zero", "zero is not a file"),
        ("/dev/null", "null is not a file"),
        ("a" * 5000, "does not exist, or cannot be reached"),
        ("nul\0", "does not exist, or cannot be reached"),
        ("text.txt", "text.txt is not JSON"),
        ("empty.json", "empty.json: no cell of it is finished"),
        ("binary", "binary is not JSON"),
        ("huge", "huge is larger than any file of a run"),
        ("pipe", "pipe is not a file"),
        ("\x1b[31mred\n", r"\x1b[31mred\n: it does not exist"),
    ],
)
def test_an_invalid_path_is_a_one_line_error(
    path: str, message: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("no run")
    (tmp_path / "empty.json").write_text('{"cells": []}')
    (tmp_path / "binary").write_bytes(BINARY)
    sparse(10**12)(tmp_path / "huge")
    os.mkfifo(tmp_path / "pipe")
    error = maml_error("report", path)
    assert message in error and error.isprintable()
    assert not (tmp_path / "report").exists()


def test_an_invalid_path_does_not_hide_the_others(
    sound: list[Path], maml: Callable[..., str], tmp_path: Path
) -> None:
    assert str(sound[0]) in maml("report", "nowhere", sound[0], "/proc/self/mem")


def test_deep_or_unreadable_folders_are_skipped(tmp_path: Path, sound: list[Path]) -> None:
    deep = tmp_path.joinpath(*["d"] * 200)
    deep.mkdir(parents=True)
    found = find_runs([tmp_path, sound[0]])
    assert len(found.runs) == 1 and "it is nested too deeply" in found.skipped[0]
