"""`maml runs` lists every run with its state and result, sorted, filtered, as a table or as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maml_pipeline.cli import main
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.list_table import print_runs
from maml_pipeline.runs.listing import FIELDS, ListedRun
from maml_pipeline.runs.state import RunState, run_state
from tests.helpers import Maml, locked_by_another_process, run_python
from tests.written_runs import write_run


@pytest.fixture
def listed(maml: Maml) -> Callable[..., list[str]]:
    """Return a function that runs `maml runs ... --json` and returns the names of the listed folders."""

    def run(*arguments: object) -> list[str]:
        return [Path(run["folder"]).name for run in json.loads(maml("runs", *arguments, "--json"))]

    return run


# Fields and states --------------------------------------------------------------------------------


def test_json_has_every_field_of_every_run_and_nothing_else(tmp_path: Path, maml: Maml) -> None:
    write_run(tmp_path / "runs" / "a", "checkpointed", 5, 7, inner_lr=0.4)
    write_run(tmp_path / "runs" / "b", "first", result=None, done=40, inner_lr="fast")
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "config.yaml").write_text("{")
    tested, stopped = json.loads(maml("runs", "--json"))[::-1]
    assert tuple(tested) == tuple(stopped) == FIELDS
    assert tested == {
        **{"experiment": "sine", "order": "checkpointed", "inner_steps": 5},
        **{"seed": 7, "inner_lr": 0.4, "meta_steps": 100, "max_steps": 100, "state": "finished"},
        **{"job": None, "reason": None},
        **{"measure": "loss", "split": "test", "result": 0.25, "ci95": 0.0625, "folder": "runs/a"},
    }
    assert stopped["inner_lr"] is None and stopped["state"] == "stopped"
    assert (stopped["meta_steps"], stopped["split"], stopped["result"]) == (40, "validation", 0.75)


def test_numbers_that_json_cannot_represent_are_null(tmp_path: Path, maml: Maml) -> None:
    write_run(tmp_path / "runs" / "a", result=float("nan"))
    (run,) = json.loads(maml("runs", "--json"))
    assert run["result"] is None and run["split"] == "test"


def test_runs_that_cannot_be_read_are_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    write_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "b" / "test.json").write_text("{")
    main(["runs"])
    printed = capsys.readouterr()
    assert printed.err == "Left out: runs/b: test.json is not JSON\n"
    assert "runs/a" in printed.out and "runs/b" not in printed.out


def test_a_run_that_has_logged_nothing_is_listed_but_not_reported(tmp_path: Path, maml: Maml) -> None:
    folder = write_run(tmp_path / "runs" / "a", result=None, done=0)
    (run,) = json.loads(maml("runs", "--json"))
    assert (run["meta_steps"], run["result"], run["split"], run["state"]) == (0, None, None, "stopped")
    write_run(tmp_path / "runs" / "b")
    assert [run.source.name for run in find_runs([tmp_path]).runs] == ["b"]
    (folder / "metrics.csv").write_text("step,train/loss\n")
    assert len(json.loads(maml("runs", "--json"))) == 2


@pytest.mark.integration
def test_a_run_is_running_while_a_process_has_locked_its_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", result=None, done=50)
    (run,) = find_runs([folder]).runs
    with locked_by_another_process(folder / ".lock"):
        assert run_state(run) is RunState.RUNNING
    assert run_state(run) is RunState.STOPPED
    (folder / "test.json").write_text("{}")  # it ended after it was read
    assert run_state(run) is RunState.FINISHED


START = "Run folder: runs/a\n"


@pytest.mark.parametrize(
    ("log", "state"),
    [
        ("", RunState.STOPPED),
        (START, RunState.STOPPED),
        (f"{START}Stopped after meta-step 40: received SIGTERM\n", RunState.STOPPED),
        (f"{START}maml: error: the loss is not finite\n", RunState.FAILED),
        (f"{START}Traceback (most recent call last):\n  File ...\nKeyError: 1\n", RunState.FAILED),
        (f"{START}maml: error: no space\n{START}", RunState.STOPPED),
        (f"{START}Stopped\nmaml: error: a is in use\n", RunState.FAILED),
        (f"{START}maml: error: x: No space left\nThe last checkpoint is intact\n", RunState.FAILED),
    ],
)
def test_a_run_has_failed_if_its_last_attempt_ended_with_an_error(
    log: str, state: RunState, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "a", result=None, done=50)
    (folder / "log.txt").write_text(log)
    (run,) = find_runs([folder]).runs
    assert run_state(run) is state


def test_the_state_of_an_unfinished_run_is_unknown_without_its_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "a", result=None)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    cell = {"config": config, "history": [{"step": 9, "val/loss": 0.5}]}
    for test, state in (({}, None), ({"test/loss": 1.0}, RunState.FINISHED)):
        (tmp_path / "tradeoff.json").write_text(json.dumps({"cells": [{**cell, "test": test}]}))
        (run,) = find_runs([tmp_path / "tradeoff.json"]).runs
        assert run_state(run) is state


# The table ----------------------------------------------------------------------------------------


def test_a_pipe_gets_one_whole_line_per_run(tmp_path: Path, maml: Maml) -> None:
    name = "omniglot-20way-1shot-with-a-long-name"
    folders = [
        write_run(tmp_path / "runs" / f"{name}-{seed}", "checkpointed", seed=seed, experiment=name)
        for seed in range(3)
    ]
    heading, *lines = maml("runs").splitlines()
    assert heading.split() == [
        *("experiment", "order", "k", "seed", "alpha", "meta-steps", "state", "result"),
        *("measure", "folder"),
    ]
    for folder, line in zip(folders, lines, strict=True):
        assert line.startswith(name) and line.endswith(f"test loss runs/{folder.name}")


@pytest.mark.parametrize("width", [80, 100])
def test_a_narrow_terminal_shows_every_folder_and_result_in_full(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "omniglot-20way-1shot-with-a-long-name"
    write_run(Path("runs/one"), "checkpointed", 10, 17, experiment=name, inner_lr=0.001)
    write_run(Path("runs/two"), "checkpointed", seed=2**20, experiment=name, result=None, done=7)
    write_run(Path("runs") / name, measure="accuracy", experiment=name, result=0.9375)
    print_runs([ListedRun.of(run) for run in find_runs([Path("runs")]).runs], width)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3 and max(map(len, lines)) <= width
    text = "\n".join(lines)
    for shown in ("runs/one ", f"runs/{name} ", "0.9375 ± 0.0625", "7 of 100", "test accuracy", "0.001"):
        assert shown in text
    assert "0.7500 ± 0.1250" in text and "validation loss" in text


def test_names_are_printed_literally(tmp_path: Path, maml: Maml) -> None:
    write_run(tmp_path / "runs" / "[red]a\x1b", experiment="[bold]x\x1b[31m")
    shown = maml("runs")
    assert r"[bold]x\x1b[31m" in shown and r"runs/[red]a\x1b" in shown and "\x1b" not in shown


# Sorting and filtering ----------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Return `runs` with a few runs, whose folders are named by their order, k and seed."""
    runs = tmp_path / "runs"
    write_run(runs / "f1", "first", result=0.5, inner_lr=0.01)
    write_run(runs / "s1", "second", result=0.3, engine="vectorized")
    write_run(runs / "c1", "checkpointed", result=0.4)
    write_run(runs / "s5", "second", 5, 3, result=None, done=50, inner_lr=0.001)
    write_run(runs / "acc", "second", experiment="omniglot-5w1s", measure="accuracy", result=0.9)
    write_run(runs / "acc2", "second", 2, experiment="omniglot-20w1s", measure="accuracy", result=0.8)
    return runs


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", "acc2 acc f1 s1 c1 s5"),
        ("--reverse", "s5 c1 s1 f1 acc acc2"),
        ("--sort order", "f1 acc2 acc s1 s5 c1"),
        ("--sort k,experiment --reverse", "s5 acc2 f1 s1 c1 acc"),
        ("--sort result", "acc acc2 s1 c1 f1 s5"),
        ("--sort alpha", "s5 f1 acc2 acc s1 c1"),
        ("--sort model.inner_lr --reverse", "acc2 acc s1 c1 f1 s5"),
        ("--sort model.engine", "s1 acc2 acc f1 c1 s5"),
        ("--sort model.engine --reverse", "s1 acc2 acc f1 c1 s5"),
        ("--sort state,seed", "s5 acc2 acc f1 s1 c1"),
        ("--sort folder", "acc acc2 c1 f1 s1 s5"),
        ("--filter k=5", "s5"),
        ("--filter k=5.0", "s5"),
        ("--filter order=second --filter inner_steps=1", "acc s1"),
        ("--filter order=second --filter k=1", "acc s1"),
        ("--filter experiment=omniglot-*", "acc2 acc"),
        ("--filter state=stopped", "s5"),
        ("--filter split=validation", "s5"),
        ("--filter model.inner_lr=1e-2", "f1"),
        ("--filter alpha=0.010", "f1"),
        ("--filter model.first_order=true", "f1"),
        ("--filter model.engine=vectorized", "s1"),
        ("--filter model.metric=null --filter k=2", "acc2"),
        ("--filter model.network=MLP --filter k=2", "acc2"),
        ("--filter model.network.hidden_features=[40,40] --filter k=2", "acc2"),
        ("--filter data.tasks=maml_pipeline.tasks.SineWaves --filter k=2", "acc2"),
        ("--filter data.tasks.shots=10 --filter k=2", "acc2"),
        ("--filter data.tasks.init_args.shots=10 --filter k=2", "acc2"),
        ("--filter folder=runs/s* --sort k", "s1 s5"),
        ("--filter k=7", ""),
        ("--filter k=many", ""),
        ("--filter model.first_order=1", ""),
        ("--filter k=1 --filter k=5", ""),
    ],
)
def test_runs_are_sorted_and_filtered(
    options: str, names: str, grid: Path, listed: Callable[..., list[str]]
) -> None:
    assert listed(*options.split()) == names.split()


def test_if_no_run_matches_the_values_that_there_are_are_named(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in (
        (("--filter", "state=finishd"), "No run has state=finishd; state is finished, stopped"),
        (("--filter", "k=1", "--filter", "k=5"), "No run satisfies all filters: k=1, k=5"),
        (("--filter", "model.engine=x"), "No run has model.engine=x; model.engine is missing, vecto"),
    ):
        main(["runs", str(grid), *options])
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--filter model.inner_rate=1", "has the key model.inner_rate; it must be experiment, "),
        ("--filter model.inner_rate=1", "did you mean model.inner_lr"),
        ("--filter lr=1", "--filter: no run has the key lr"),
        ("--filter shots=1", "did you mean data.tasks.shots?"),
        ("--filter model=1", "--filter: no run has the key model;"),
        ("--sort nope", "--sort: no run has the key nope"),
        ("--sort k,hidden_features", "did you mean model.network.hidden_features?"),
        ("--filter k", "--filter: it is k; it must be KEY=VALUE, such as k=5"),
        ("--filter k=", "it must be KEY=VALUE"),
        ("--sort k,", "it must be KEY or KEY,KEY"),
    ],
)
def test_an_unknown_key_gets_the_valid_ones(
    options: str, message: str, grid: Path, maml_error: Maml
) -> None:
    assert message in maml_error("runs", *options.split())


def test_without_runs_the_folder_is_named(maml_error: Maml, tmp_path: Path) -> None:
    assert "there is no run to show: runs: it does not exist" in maml_error("runs")
    (tmp_path / "runs").mkdir()
    assert "there is no run to show: runs: it holds no run" in maml_error("runs", "--json")


@pytest.mark.integration
def test_listing_runs_imports_neither_pytorch_nor_lightning(grid: Path) -> None:
    script = f"""
        import sys
        from maml_pipeline.cli import main
        main(["runs", {str(grid)!r}, "--sort", "result"])
        heavy = {{"torch", "pytorch_lightning", "wandb", "numpy", "matplotlib"}} & sys.modules.keys()
        assert not heavy, heavy
    """
    done = run_python(script)
    assert done.returncode == 0, done.stderr
