"""A run never resumes or overwrites another run."""

import csv
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maml_pipeline.runs.compatibility import (
    MAY_CHANGE_ON_EVALUATION,
    MAY_CHANGE_ON_RESUME,
    config_differences,
)
from tests.helpers import (
    SHORT,
    SHORT_NAME,
    Maml,
    fit_until_ctrl_c,
    locked_by_another_process,
    meta_step,
    read_checkpoint,
    read_config,
    read_files,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("unset_run_dir")]


def losses(folder: Path) -> list[tuple[str, str]]:
    """Return the validation losses with their meta-steps."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


# Resuming -----------------------------------------------------------------------------------------


def test_resuming_selects_the_run_with_the_same_settings(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, finished = Path("runs", SHORT_NAME), Path("runs", f"{SHORT_NAME}-2")
    fit_until_ctrl_c(maml, capsys, 6, *SHORT, "--model.inner_lr", 0.01)
    maml("fit", *SHORT, "--model.inner_lr", 0.1)
    before = read_files(finished)

    maml("fit", *SHORT, "--model.inner_lr", 0.01, "--ckpt_path", "last")
    assert read_files(finished) == before
    assert meta_step(stopped) == 12 and read_config(stopped)["model"]["inner_lr"] == 0.01
    assert (stopped / "test.json").exists()
    assert not Path("runs", f"{SHORT_NAME}-3").exists()


def test_the_newest_of_several_identical_runs_is_resumed(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        fit_until_ctrl_c(maml, capsys, 6, *SHORT)
    maml("fit", *SHORT, "--ckpt_path", "last")
    assert [meta_step(Path("runs", name)) for name in (SHORT_NAME, f"{SHORT_NAME}-2")] == [6, 12]


def test_resuming_with_other_settings_names_the_key_that_differs(
    maml: Maml, maml_error: Callable[..., str]
) -> None:
    maml("fit", *SHORT)
    maml("fit", *SHORT, "--model.inner_lr", 0.2, "--model.inner_steps", 2)
    before = read_files(Path("runs"))
    error = maml_error("fit", *SHORT, "--model.inner_lr", 0.05, "--ckpt_path", "last")
    assert f"runs/{SHORT_NAME} holds another run: model.inner_lr is 0.05 here and 0.1 there" in error
    for which in ("last", "best"):
        named = ("--run.dir", f"runs/{SHORT_NAME}", "--ckpt_path", which)
        error = maml_error("fit", *SHORT, "--data.tasks.shots", 7, *named)
        assert "data.tasks.init_args.shots is 7 here and 5 there" in error
    assert read_files(Path("runs")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.max_steps", 16],
        ["--trainer.log_every_n_steps", 3],
        ["--run.checkpoint_every", 5, "--probes.every", 7],
        ["--data.num_workers", 1],
        ["--trainer.devices", "auto"],
    ],
)
def test_a_run_resumes_with_settings_that_may_change(
    arguments: list[object], maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_until_ctrl_c(maml, capsys, 6, *SHORT)
    maml("fit", *SHORT, *arguments, "--ckpt_path", "last")
    assert [path.name for path in Path("runs").iterdir()] == [SHORT_NAME]
    assert (
        meta_step(Path("runs", SHORT_NAME))
        == read_config(Path("runs", SHORT_NAME))["trainer"]["max_steps"]
    )


def test_every_setting_that_may_change_is_a_config_key_with_a_reason(maml: Maml) -> None:
    maml("fit", *SHORT)
    known = read_config(Path("runs", SHORT_NAME))
    for key, reason in {**MAY_CHANGE_ON_RESUME, **MAY_CHANGE_ON_EVALUATION}.items():
        if key.startswith("data.tasks.init_args"):
            continue  # not a key of the toy task
        value: Any = known
        for name in key.split("."):
            assert name in value, key
            value = value[name]
        assert reason and (key == "probes" or not isinstance(value, dict))
    assert not config_differences({"probes": {"every": 1}}, {"probes": {"every": 2}})
    assert config_differences({"model": {"tasks_per_chunks": 1}}, {"model": {"tasks_per_chunks": 2}})


def test_a_key_missing_from_a_config_has_its_default(maml: Maml, maml_error: Callable[..., str]) -> None:
    maml("fit", *SHORT)
    folder = Path("runs", SHORT_NAME)
    old = read_config(folder)
    del old["model"]["first_order_meta_steps"], old["data"]["tasks"]["init_args"]["query_shots"]
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    maml("fit", *SHORT, "--ckpt_path", "last")
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    error = maml_error("fit", *SHORT, "--model.first_order_meta_steps", 3, "--ckpt_path", "last")
    assert "model.first_order_meta_steps is 3 here and 0 there" in error


def test_the_hint_after_ctrl_c_is_a_command_that_resumes(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("a folder", "it's mine")
    printed = fit_until_ctrl_c(maml, capsys, 6, *SHORT, "--run.dir", place)
    (hint,) = (line for line in printed.splitlines() if line.startswith("To resume: "))
    words = shlex.split(hint.removeprefix("To resume: "))
    assert words[:2] == ["maml", "fit"]
    maml(*words[1:])
    assert meta_step(place) == 12 and (place / "test.json").exists()
    assert not Path("runs").exists()


def test_max_steps_below_the_current_meta_step_is_rejected(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    maml("fit", *SHORT)
    before = read_files(Path("runs"))
    error = maml_error("fit", *SHORT, "--trainer.max_steps", 8, "--ckpt_path", "last")
    assert "trainer.max_steps is 8, but" in error and "is at meta-step 12" in error
    assert read_files(Path("runs")) == before


def test_a_checkpoint_of_another_run_starts_a_new_run(maml: Maml) -> None:
    maml("fit", *SHORT)
    before = read_files(Path("runs", SHORT_NAME))
    file = Path("runs", SHORT_NAME, "checkpoints", "last.ckpt")
    other = ("--model.inner_lr", 0.2, "--trainer.max_steps", 16)
    maml("fit", *SHORT, *other, "--ckpt_path", file)
    assert read_files(Path("runs", SHORT_NAME)) == before
    new = Path("runs", f"{SHORT_NAME}-2")
    assert meta_step(new) == 16 and read_config(new)["model"]["inner_lr"] == 0.2
    assert meta_step(new, "best") == 16, "the other run's best checkpoint does not count"


def test_a_new_run_from_a_checkpoint_must_have_meta_steps_left_to_train(
    maml: Maml, maml_error: Callable[..., str]
) -> None:
    maml("fit", *SHORT)
    before = read_files(Path("runs"))
    start = ("--model.inner_lr", 0.2, "--ckpt_path", f"runs/{SHORT_NAME}/checkpoints/last.ckpt")
    for end in (8, 12):
        error = maml_error("fit", *SHORT, *start, "--trainer.max_steps", end)
        assert f"trainer.max_steps is {end}, but" in error and "set more than 12" in error
    assert read_files(Path("runs")) == before


def test_a_new_run_from_a_checkpoint_goes_on_with_its_optimizer(
    maml: Maml, maml_error: Callable[..., str]
) -> None:
    maml("fit", *SHORT)
    before = read_files(Path("runs"))
    file = f"runs/{SHORT_NAME}/checkpoints/last.ckpt"
    for other, named in {
        ("--model.optimizer.lr", 0.5): "model.optimizer.init_args.lr is 0.5 here and 0.02 in",
        ("--model.optimizer", "torch.optim.SGD"): "model.optimizer.class_path is torch.optim.SGD here",
        ("--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR"): "model.lr_scheduler is {",
    }.items():
        error = maml_error("fit", *SHORT, *other, "--trainer.max_steps", 16, "--ckpt_path", file)
        assert named in error and f"in runs/{SHORT_NAME}, whose optimizer" in error
    assert read_files(Path("runs")) == before


def test_a_checkpoint_in_run_dir_resumes_that_run(maml: Maml, maml_error: Callable[..., str]) -> None:
    named = ("--run.dir", "mine")
    maml("fit", *SHORT, *named)
    file = Path("mine", "checkpoints", "last.ckpt")
    maml("fit", *SHORT, *named, "--trainer.max_steps", 16, "--ckpt_path", file)
    assert meta_step(Path("mine")) == 16
    error = maml_error("fit", *SHORT, *named, "--model.inner_lr", 0.2, "--ckpt_path", file)
    assert "model.inner_lr is 0.2 here and 0.1 there" in error


# The config of a run ------------------------------------------------------------------------------


def test_a_config_does_not_depend_on_how_the_run_was_started(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_until_ctrl_c(maml, capsys, 6, *SHORT, "--run.dir", "mine")
    maml("fit", *SHORT, "--run.dir", "mine", "--ckpt_path", "last")
    described = read_config(Path("mine"))
    assert described["ckpt_path"] is None and described["run"]["dir"] is None
    before = read_files(Path("mine"))
    # A run started from that config trains from scratch in a new folder.
    maml("fit", "--config", Path("mine", "config.yaml"))
    assert read_files(Path("mine")) == before
    assert (
        read_checkpoint(Path("runs", SHORT_NAME))["state_dict"].keys()
        == read_checkpoint(Path("mine"))["state_dict"].keys()
    )
    for name, value in read_checkpoint(Path("mine"))["state_dict"].items():
        assert torch.equal(read_checkpoint(Path("runs", SHORT_NAME))["state_dict"][name], value)
    assert losses(Path("runs", SHORT_NAME)) == losses(Path("mine"))


def test_an_older_config_with_an_absolute_run_dir_resumes_after_a_move(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_until_ctrl_c(maml, capsys, 6, *SHORT, "--run.dir", "mine")
    old = read_config(Path("mine"))
    old["run"]["dir"], old["ckpt_path"] = str(Path("mine").resolve()), None
    Path("mine", "config.yaml").write_text(yaml.safe_dump(old))
    Path("mine").rename("moved")
    maml("fit", "--config", "moved/config.yaml", "--ckpt_path", "last")
    assert meta_step(Path("moved")) == 12 and not Path("mine").exists()


# Moved folders ------------------------------------------------------------------------------------


def test_a_moved_run_resumes_in_its_new_folder_with_its_best_checkpoint(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a large outer learning rate the loss rises again: the best checkpoint is an early one.
    run = (*SHORT, "--trainer.max_steps", 60, "--model.optimizer.lr", 2.0)
    maml("fit", *run, "--run.dir", "whole")
    fit_until_ctrl_c(maml, capsys, 40, *run, "--run.dir", "old")
    assert meta_step(Path("old"), "best") < 40
    Path("old").rename("moved")
    # Another run takes the old folder.
    maml("fit", *SHORT, "--run.dir", "old")
    before = read_files(Path("old"))
    maml("fit", "--config", "moved/config.yaml", "--ckpt_path", "last")
    assert read_files(Path("old")) == before
    for name in ("test.json", "config.yaml"):
        assert Path("moved", name).read_bytes() == Path("whole", name).read_bytes()
    for which in ("best", "last"):
        ours, theirs = (read_checkpoint(Path(run), which)["state_dict"] for run in ("whole", "moved"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_file_of_a_run_contains_its_path(maml: Maml) -> None:
    maml("fit", *SHORT, "--run.dir", "here")
    text = str(Path("here").resolve()).encode()
    assert not [name for name, content in read_files(Path("here")).items() if text in content]


# Two processes ------------------------------------------------------------------------------------


def test_a_second_process_in_a_run_is_rejected_at_once(
    maml: Maml, maml_error: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fit_until_ctrl_c(maml, capsys, 6, *SHORT, "--run.dir", "mine")
    before = read_files(Path("mine"))
    with locked_by_another_process(Path("mine", ".lock")):
        error = maml_error("fit", "--config", "mine/config.yaml", "--ckpt_path", "last")
        assert "mine is in use: another process is training in it" in error
        assert read_files(Path("mine")) == before
        # Testing a run needs no lock.
        assert "Test of best.ckpt" in maml("test", "--config", "mine/config.yaml")
    maml("fit", "--config", "mine/config.yaml", "--ckpt_path", "last")
    assert meta_step(Path("mine")) == 12


def test_a_run_that_is_just_starting_owns_its_folder(
    maml_error: Callable[..., str], tmp_path: Path
) -> None:
    Path("mine", "checkpoints").mkdir(parents=True)
    with locked_by_another_process(Path("mine", ".lock")):
        assert "mine is in use" in maml_error("fit", *SHORT, "--run.dir", "mine")
    assert {*os.listdir("mine")} == {"checkpoints", ".lock"}
