"""A run's result is never replaced by another measurement."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import (
    SHORT,
    SHORT_NAME,
    Maml,
    fit_until_ctrl_c,
    meta_step,
    read_files,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("unset_run_dir")]


def test_testing_from_a_runs_config_reproduces_its_result(maml: Maml) -> None:
    maml("fit", *SHORT, "--trainer.max_steps", 14)
    folder = Path("runs", SHORT_NAME)
    before = read_files(folder)
    assert meta_step(folder) == 14 and meta_step(folder, "best") == 12
    printed = maml("test", "--config", folder / "config.yaml")
    assert "Test of best.ckpt, from meta-step 12 of 14, second order" in printed
    assert read_files(folder) == before
    # Other ways to name the same checkpoint.
    for arguments in (
        ("--config", folder / "config.yaml", "--ckpt_path", "best"),
        ("--config", folder / "config.yaml", "--data.num_workers", 1),
        (*SHORT, "--trainer.max_steps", 14, "--ckpt_path", "best"),
        (*SHORT, "--trainer.max_steps", 14, "--run.dir", folder),
        (*SHORT, "--ckpt_path", folder / "checkpoints" / "best.ckpt"),
    ):
        maml("test", *arguments)
        assert read_files(folder) == before, arguments


@pytest.mark.parametrize(
    ("arguments", "key", "here", "there"),
    [
        (["--data.test_tasks", 4], "data.test_tasks", 4, 9),
        (["--model.eval_inner_steps", 1], "model.eval_inner_steps", 1, 3),
        (["--ckpt_path", "last"], "ckpt_path", "last.ckpt", "best.ckpt"),
        (["--model.inner_lr", 0.2], "model.inner_lr", 0.2, 0.1),
    ],
)
def test_a_different_measurement_goes_to_another_file_with_the_differences(
    arguments: list[object], key: str, here: object, there: object, maml: Maml
) -> None:
    maml("fit", *SHORT, "--trainer.max_steps", 14)
    folder = Path("runs", SHORT_NAME)
    before = read_files(folder)
    printed = maml("test", "--config", folder / "config.yaml", *arguments)
    assert "Settings differ from the run's; saved to runs/toy-second-s0/test-" in printed
    assert f"{key}: {here} here, {there} in the run" in printed
    after = read_files(folder)
    (own,) = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert own in printed.replace("\n", "")
    kept = json.loads((folder / own).read_text())
    assert kept["differs"] == {key: {"here": here, "run": there}}
    assert "test/loss" in kept
    # Repeating it changes no file.
    maml("test", "--config", folder / "config.yaml", *arguments)
    assert read_files(folder) == after


def test_an_evaluation_without_a_checkpoint_says_so_and_names_the_newest_trained_run(
    maml: Maml,
) -> None:
    printed = maml("test", *SHORT)
    assert "No checkpoint: testing the initial parameters; to test a trained run:" in printed
    assert "\n  maml test --config RUN_DIR/config.yaml\n" in printed
    assert "Test of the initial parameters\n" in printed
    assert "Validation of the initial parameters\n" in maml("validate", *SHORT)
    maml("fit", *SHORT)
    maml("fit", *SHORT, "--run.dir", "elsewhere")
    maml("fit", *SHORT, "--model.inner_lr", 0.2)  # runs/toy-second-s0-2
    before = read_files(Path("runs"))
    printed = maml("test", *SHORT, "--data.test_tasks", 4)
    assert "No checkpoint" in printed and "Checkpoint:" not in printed
    assert f"\n  maml test --config runs/{SHORT_NAME}/config.yaml\n" in printed
    printed = maml("validate", *SHORT, "--model.inner_lr", 0.2)
    assert f"\n  maml validate --config runs/{SHORT_NAME}-2/config.yaml\n" in printed
    assert read_files(Path("runs")) == before
    # A run whose config cannot be read is passed over.
    (Path("runs") / f"{SHORT_NAME}-2" / "config.yaml").write_text("[")
    assert "RUN_DIR" in maml("test", *SHORT, "--model.inner_lr", 0.2)


def test_a_run_without_validation_is_tested_with_its_final_parameters(maml: Maml) -> None:
    printed = maml("fit", *SHORT, "--trainer.limit_val_batches", 0, "--model.first_order", "true")
    assert "Test of the final parameters, from meta-step 12 of 12, first order" in printed


def test_ckpt_path_best_selects_the_run_with_the_same_settings(
    maml: Maml, maml_error: Callable[..., str]
) -> None:
    maml("fit", *SHORT, "--model.inner_lr", 0.2)
    maml("fit", *SHORT)
    before = read_files(Path("runs"))
    printed = maml(
        "test", *SHORT, "--model.inner_lr", 0.2, "--data.test_tasks", 4, "--ckpt_path", "best"
    )
    assert "data.test_tasks: 4 here, 9 in the run" in printed
    (added,) = read_files(Path("runs")).keys() - before.keys()
    assert added.startswith(f"{SHORT_NAME}/test-")
    error = maml_error("test", *SHORT, "--model.inner_lr", 0.3, "--ckpt_path", "best")
    assert "model.inner_lr is 0.3 here and" in error


def test_testing_a_checkpoint_with_another_runs_config_writes_nothing(
    maml: Maml, maml_error: Callable[..., str]
) -> None:
    maml("fit", *SHORT, "--run.dir", "one")
    maml("fit", *SHORT, "--run.dir", "two", "--model.inner_lr", 0.2)
    before = read_files(Path())
    best = ("--ckpt_path", "one/checkpoints/best.ckpt")
    assert "Test of best.ckpt" in maml("test", "--config", "two/config.yaml", *best)
    assert "Test of best.ckpt" in maml("test", *SHORT, "--model.inner_lr", 0.2, *best)
    assert read_files(Path()) == before
    error = maml_error("test", *SHORT, "--run.dir", "two", *best)
    assert "is not a checkpoint of the run in run.dir two" in error


def test_an_unfinished_run_has_no_result(maml: Maml, capsys: pytest.CaptureFixture[str]) -> None:
    fit_until_ctrl_c(maml, capsys, 6, *SHORT)
    folder = Path("runs", SHORT_NAME)
    assert "trained meta-steps: 6 here, 12 in the run" in maml(
        "test", "--config", folder / "config.yaml"
    )
    assert not (folder / "test.json").exists() and len([*folder.glob("test-*.json")]) == 1


def test_a_resumed_run_has_no_result_until_it_ends(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    maml("fit", *SHORT)
    fit_until_ctrl_c(maml, capsys, 14, *SHORT, "--trainer.max_steps", 16, "--ckpt_path", "last")
    assert not Path("runs", SHORT_NAME, "test.json").exists()
    maml("fit", *SHORT, "--trainer.max_steps", 16, "--ckpt_path", "last")
    assert json.loads(Path("runs", SHORT_NAME, "test.json").read_text())["meta_step"] == 16
