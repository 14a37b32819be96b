"""Lightning features that work here: early stopping, additional loggers and checkpoints, schedules."""

from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Timer

from tests.helpers import SHORT, Maml, final_weights, read_checkpoint

pytestmark = pytest.mark.integration

STOPS_AT_ONCE = (
    *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
    *("--trainer.callbacks.stopping_threshold", 1e9),
)
PLATEAU = (
    *("--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
    *("--model.lr_scheduler.patience", 0, "--model.lr_scheduler.threshold", 1e9),
)


def test_a_run_ended_by_early_stopping_stays_ended(maml: Maml, tmp_path: Path) -> None:
    run = ("fit", *SHORT, *STOPS_AT_ONCE, "--run.dir", tmp_path / "run")
    assert "Training ended after meta-step 4: EarlyStopping: Stopping threshold reached" in maml(*run)
    before = final_weights(tmp_path / "run")
    printed = maml(*run, "--ckpt_path", "last")
    assert (
        "Training ended after meta-step 4" in printed
        and "Test of best.ckpt, from meta-step 4 of 12" in printed
    )
    assert read_checkpoint(tmp_path / "run")["global_step"] == 4
    assert torch.equal(final_weights(tmp_path / "run"), before)
    # With another condition, training continues.
    other = (*run[:-3], 0, "--run.dir", tmp_path / "run", "--ckpt_path", "last")
    assert "Training ended" not in maml(*other)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 12


def test_a_time_limit_ends_training_at_a_meta_step_and_a_longer_one_resumes_it(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock that advances by one second per batch.
    looks = iter(range(1, 1000))
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: next(looks))
    run = (*SHORT, "--trainer.accumulate_grad_batches", 2, "--run.dir", tmp_path / "run")
    interval = ("--trainer.val_check_interval", 100)
    printed = maml("fit", *run, *interval, "--trainer.max_time", "00:00:00:06")
    step = read_checkpoint(tmp_path / "run")["global_step"]
    assert isinstance(step, int) and 0 < step < 12
    assert f"Training ended after meta-step {step}: time limit reached" in printed
    maml("validate", "--config", tmp_path / "run" / "config.yaml")
    assert (tmp_path / "run" / "val.json").exists()  # of the run itself, which has ended
    longer = ("--trainer.max_time", "00:00:59:00", "--ckpt_path", "last")
    assert "Training ended" not in maml("fit", *run, *interval, *longer)
    assert read_checkpoint(tmp_path / "run")["global_step"] == 12


def test_an_additional_logger_keeps_metrics_csv(maml: Maml, tmp_path: Path) -> None:
    mine = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "mine")
    maml("fit", *SHORT, *mine, "--run.dir", tmp_path / "run")
    (theirs,) = (tmp_path / "mine").rglob("metrics.csv")
    for table in (tmp_path / "run" / "metrics.csv", theirs):
        assert "val/loss" in table.read_text().splitlines()[0]


def test_an_additional_checkpoint_callback_saves_and_does_not_affect_the_test(
    maml: Maml, tmp_path: Path
) -> None:
    own = (
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.dirpath",
        tmp_path / "my" / "own",
    )
    maml("fit", *SHORT, *own, "--run.dir", tmp_path / "run")
    assert list((tmp_path / "my" / "own").iterdir())
    config = tmp_path / "run" / "config.yaml"
    assert "Test of best.ckpt" in maml("test", "--config", config, "--ckpt_path", "best")


@pytest.mark.parametrize(
    ("unvalidated", "named"),
    [
        (("--trainer.limit_val_batches", 0), "trainer.limit_val_batches is 0"),
        (
            ("--trainer.val_check_interval", 13),
            "training ends at meta-step 12, before the first validation at 13",
        ),
        (
            ("--trainer.check_val_every_n_epoch", 4, "--trainer.limit_train_batches", 4),
            "training ends at meta-step 12, before the first validation at 16",
        ),
        (
            ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3),
            "training ends at meta-step 3, before the first validation at 4",
        ),
    ],
)
def test_what_acts_on_validations_needs_one(
    unvalidated: tuple[object, ...], named: str, maml: Maml, maml_error: Maml, tmp_path: Path
) -> None:
    for acting, refused in ((STOPS_AT_ONCE, "EarlyStopping"), (PLATEAU, "ReduceLROnPlateau")):
        error = maml_error("fit", *SHORT, *acting, *unvalidated)
        assert f"{refused}, but" in error and named in error
    assert not list(tmp_path.iterdir())
    # The other settings need no validation, and neither does the test of a run.
    maml("fit", *SHORT, *unvalidated)
    maml("test", *SHORT, *STOPS_AT_ONCE, *PLATEAU, *unvalidated)


def test_a_plateau_scheduler_steps_once_per_validation_and_resumes_exactly(
    maml: Maml, tmp_path: Path
) -> None:
    maml("fit", *SHORT, *PLATEAU, "--run.dir", tmp_path / "whole")
    # Three validations: the first is the best so far, and each after it divides the rate by ten.
    (state,) = read_checkpoint(tmp_path / "whole")["lr_schedulers"]
    assert state["last_epoch"] == 3
    part = ("--run.dir", tmp_path / "parts", "--trainer.max_steps")
    maml("fit", *SHORT, *PLATEAU, *part, 4)
    maml("fit", *SHORT, *PLATEAU, *part, 12, "--ckpt_path", "last")
    assert (
        read_checkpoint(tmp_path / "parts")["lr_schedulers"]
        == read_checkpoint(tmp_path / "whole")["lr_schedulers"]
    )
    assert torch.equal(final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole"))
