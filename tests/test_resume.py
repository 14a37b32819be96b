"""A run that is stopped or killed and then resumed ends exactly like an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from maml_pipeline.learner import MetaLearner
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO
from maml_pipeline.signals import SIGNALS
from tests.helpers import (
    RUN,
    Maml,
    assert_same_run,
    checkpoint_tensors,
    maml_command,
    process_environment,
    read_metrics,
    run_python,
    untimed_metrics,
)

pytestmark = pytest.mark.integration


def last_step(folder: Path) -> int:
    """Return the last meta-step that a run has logged, or -1."""
    rows = read_metrics(folder) if (folder / "metrics.csv").exists() else []
    return int(rows[-1]["step"]) if rows else -1


def kill_once_at(folder: Path, steps: int, accumulate: int) -> None:
    """Run the command in a child process and kill it after it has logged `steps` meta-steps."""
    settings = ("--run.dir", folder, "--trainer.accumulate_grad_batches", accumulate)
    command = maml_command(*RUN, *settings)
    with subprocess.Popen(command, env=process_environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while last_step(folder) <= steps and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_fit_resumes_bit_for_bit(
    maml: Callable[..., str], tmp_path: Path, accumulate: int
) -> None:
    settings = ("--trainer.accumulate_grad_batches", accumulate)
    maml(*RUN, *settings, "--run.dir", tmp_path / "whole")
    kill_once_at(tmp_path / "killed", 110, accumulate)
    killed_at = int(checkpoint_tensors(tmp_path / "killed")["meta_step"])
    assert 0 < killed_at < 300
    maml(*RUN, *settings, "--run.dir", tmp_path / "killed", "--ckpt_path", "last")

    assert_same_run(tmp_path / "whole", tmp_path / "killed")


STOPPED_RUN = (
    *(*RUN, "--trainer.max_steps", 60, "--trainer.val_check_interval", 20),
    *("--run.checkpoint_every", 15),
)


class SignalAt(Callback):
    """Sends this process a signal during a meta-step or a validation."""

    def __init__(self, meta_step: int, signum: int, hook: str = "on_before_optimizer_step") -> None:
        self.meta_step = meta_step
        self.signum = signum
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *args: Any) -> None:
        # The hook runs before the update that completes the meta-step.
        if trainer.state.fn == "fit" and trainer.global_step + 1 >= self.meta_step:
            self.meta_step = 10**9
            os.kill(os.getpid(), self.signum)


def stop_at(
    maml: Maml,
    folder: Path,
    meta_step: int,
    signum: int,
    hook: str = "on_before_optimizer_step",
    accumulate: int = 1,
) -> int:
    """Run until the signal, and return the exit status."""
    arguments = {"meta_step": meta_step, "signum": int(signum), "hook": hook}
    spy = f'{{"class_path": "tests.test_resume.SignalAt", "init_args": {json.dumps(arguments)}}}'
    resume = ("--ckpt_path", "last") if folder.exists() else ()
    settings = ("--trainer.accumulate_grad_batches", accumulate, "--run.dir", folder, *resume)
    with pytest.raises(SystemExit) as stopped:
        maml(*STOPPED_RUN, *settings, f"--trainer.callbacks={spy}")
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopping_by_any_signal_and_resuming_never_changes_the_run(
    maml: Maml, tmp_path: Path, accumulate: int
) -> None:
    settings = ("--trainer.accumulate_grad_batches", accumulate)
    maml(*STOPPED_RUN, *settings, "--run.dir", tmp_path / "whole")
    stopped = tmp_path / "stopped"
    steps = sorted(random.Random(accumulate).sample(range(5, 55), len(SIGNALS)))
    for meta_step, signum in zip(steps, SIGNALS, strict=True):
        assert stop_at(maml, stopped, meta_step, signum, accumulate=accumulate) == 128 + signum
        assert checkpoint_tensors(stopped)["meta_step"] == meta_step
        assert last_step(stopped) <= meta_step
    maml(*STOPPED_RUN, *settings, "--run.dir", stopped, "--ckpt_path", "last")
    assert_same_run(tmp_path / "whole", stopped)


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_validation_batch_end"])
def test_a_stop_during_a_validation_keeps_its_result(maml: Maml, tmp_path: Path, hook: str) -> None:
    maml(*STOPPED_RUN, "--run.dir", tmp_path / "whole")
    stop_at(maml, tmp_path / "stopped", 40, signal.SIGTERM, hook)
    assert checkpoint_tensors(tmp_path / "stopped")["meta_step"] == 40
    rows = read_metrics(tmp_path / "stopped")
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [19, 39]
    maml(*STOPPED_RUN, "--run.dir", tmp_path / "stopped", "--ckpt_path", "last")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_stop_during_the_test_is_immediate_and_the_test_is_repeated(
    maml: Maml, tmp_path: Path
) -> None:
    maml(*STOPPED_RUN, "--run.dir", tmp_path / "whole")
    # The signal arrives in the last meta-step, so that the test is the first to see it.
    assert stop_at(maml, tmp_path / "stopped", 60, signal.SIGTERM) == 143
    assert not (tmp_path / "stopped" / "test.json").exists()
    for _ in range(2):  # the second time nothing is left to train, and the result is replaced
        maml(*STOPPED_RUN, "--run.dir", tmp_path / "stopped", "--ckpt_path", "last")
        assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    state = {"weights": torch.zeros(1000)}
    AtomicCheckpointIO().save_checkpoint(state, path)
    script = f"""
        import os, pathlib, signal
        import torch
        from maml_pipeline.learner.checkpoints import AtomicCheckpointIO
        # The new file is complete, but has not replaced the old one yet.
        pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        AtomicCheckpointIO().save_checkpoint({{"weights": torch.ones(1000)}}, {str(path)!r})
    """
    killed = run_python(script)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the unfinished file remains beside it
    assert torch.equal(torch.load(path)["weights"], state["weights"])


def test_a_row_cut_short_by_a_kill_is_written_again(maml: Maml, tmp_path: Path) -> None:
    maml(*STOPPED_RUN, "--run.dir", tmp_path / "whole")
    stop_at(maml, tmp_path / "killed", 33, signal.SIGTERM)
    table = tmp_path / "killed" / "metrics.csv"
    table.write_text(table.read_text() + "0,,,,,,1")
    maml(*STOPPED_RUN, "--run.dir", tmp_path / "killed", "--ckpt_path", "last")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


class Dropping(nn.Module):
    """A network that draws from every random number generator during training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        noise = float(np.random.rand()) + random.random() if self.training else 1.0
        y: Tensor = self.body(x) * noise
        return y


# The vectorized engine refuses random numbers.
DROPPING = ("--model.network", "tests.test_resume.Dropping", "--model.engine", "learn2learn")
VARIANTS: dict[str, tuple[object, ...]] = {
    "float64": ("--trainer.precision", 64),
    "bfloat16": ("--trainer.precision", "bf16-mixed"),
    "dropout": DROPPING,
    "accumulated dropout": (*DROPPING, "--trainer.accumulate_grad_batches", 2),
    "epochs": ("--trainer.limit_train_batches", 4, "--trainer.log_every_n_steps", 3),
    "annealed learning rate": (
        *("--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR"),
        *("--model.lr_scheduler.step_size", 7, "--model.lr_scheduler.gamma", 0.5),
    ),
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_extending_a_run_equals_training_it_at_once(
    maml: Maml, tmp_path: Path, settings: tuple[object, ...]
) -> None:
    run = (*RUN, "--trainer.val_check_interval", 6, "--probes.every", 10, *settings)
    maml(*run, "--trainer.max_steps", 40, "--run.dir", tmp_path / "whole")
    maml(*run, "--trainer.max_steps", 23, "--run.dir", tmp_path / "parts")
    resume = ("--run.dir", tmp_path / "parts", "--ckpt_path", "last")
    maml(*run, "--trainer.max_steps", 40, *resume)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_validation_runs_between_meta_steps(maml: Maml, tmp_path: Path) -> None:
    run = (*RUN, "--trainer.max_steps", 12, "--trainer.val_check_interval", 3)
    maml(*run, "--trainer.accumulate_grad_batches", 2, "--run.dir", tmp_path / "run")
    validated = [row["step"] for row in untimed_metrics(tmp_path / "run") if row["val/loss"]]
    assert validated == ["2", "5", "8", "11"]
    # The best checkpoint lies at a complete meta-step, and resuming from it repeats the run.
    best = checkpoint_tensors(tmp_path / "run", "best")["meta_step"]
    assert int(best) % 3 == 0
    resume = (
        "--trainer.accumulate_grad_batches",
        2,
        "--run.dir",
        tmp_path / "run",
        "--ckpt_path",
        "best",
    )
    before = checkpoint_tensors(tmp_path / "run")
    maml(*run, *resume)
    after = checkpoint_tensors(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_testing_a_float64_run_reproduces_its_result(maml: Maml, tmp_path: Path) -> None:
    run = (*RUN, "--trainer.max_steps", 12, "--trainer.val_check_interval", 6, "--trainer.precision", 64)
    maml(*run, "--run.dir", tmp_path / "run")
    result = (tmp_path / "run" / "test.json").read_text()
    maml("test", "--config", tmp_path / "run" / "config.yaml", "--ckpt_path", "best")
    assert (tmp_path / "run" / "test.json").read_text() == result


def test_a_run_ended_by_early_stopping_does_not_continue(maml: Maml, tmp_path: Path) -> None:
    settings = {"monitor": "val/loss", "patience": 1, "min_delta": 100.0}
    stopping = json.dumps({"class_path": "EarlyStopping", "init_args": settings})
    run = (*RUN, f"--trainer.callbacks={stopping}", "--trainer.val_check_interval", 5)
    maml(*run, "--run.dir", tmp_path / "run")
    ended = {name: checkpoint_tensors(tmp_path / "run", name) for name in ("last", "best")}
    result, table = (tmp_path / "run" / "test.json").read_text(), untimed_metrics(tmp_path / "run")
    assert int(ended["last"]["meta_step"]) == 10
    maml(*run, "--run.dir", tmp_path / "run", "--ckpt_path", "last")
    for name, state in ended.items():
        again = checkpoint_tensors(tmp_path / "run", name)
        assert all(torch.equal(value, again[key]) for key, value in state.items())
    assert (tmp_path / "run" / "test.json").read_text() == result
    assert untimed_metrics(tmp_path / "run") == table


def test_going_back_to_the_best_checkpoint_leaves_table_and_last_checkpoint_at_one_meta_step(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*RUN, "--trainer.max_steps", 12, "--trainer.val_check_interval", 5)
    maml(*run, "--run.dir", tmp_path / "whole")
    maml(*run, "--run.dir", tmp_path / "run")

    def killed(*_: Any) -> None:
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MetaLearner, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            maml(*run, "--run.dir", tmp_path / "run", "--ckpt_path", "best")
    best, last = (
        int(checkpoint_tensors(tmp_path / "run", name)["meta_step"]) for name in ("best", "last")
    )
    assert best == last < 12 and last_step(tmp_path / "run") < best
    maml(*run, "--run.dir", tmp_path / "run", "--ckpt_path", "last")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    # With nothing left to train, too.
    ended = ("--trainer.max_steps", best, "--ckpt_path", "best")
    maml(*run, "--run.dir", tmp_path / "run", *ended)
    assert int(checkpoint_tensors(tmp_path / "run")["meta_step"]) == best
    maml(*run, "--run.dir", tmp_path / "run", "--ckpt_path", "last")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_killed_before_its_first_checkpoint_starts_again_without_its_best_state(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*RUN, "--trainer.val_check_interval", 4)
    maml(*run, "--trainer.max_steps", 12, "--run.dir", tmp_path / "before")
    best = tmp_path / "before" / "checkpoints" / "best.ckpt"
    # Validates worse than the run before, and better each time.
    start = ("--model.inner_lr", 0.0001, "--ckpt_path", best)
    new = (*run, "--trainer.max_steps", 30, "--run.checkpoint_every", 500, *start, "--run.dir")
    maml(*new, tmp_path / "whole")
    training_step = MetaLearner.training_step

    def killed(learner: MetaLearner, *batch: Any) -> Any:
        if learner.global_step == 18:
            raise KeyError("killed")
        return training_step(learner, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(MetaLearner, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            maml(*new, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["best.ckpt"]
    maml(*new, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class StopAtBatch(Callback):
    """Requests a stop in the middle of a meta-step, as a Timer may."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.fit_loop.total_batch_idx == 6


def test_a_stop_requested_within_a_meta_step_takes_effect_after_it(maml: Maml, tmp_path: Path) -> None:
    spy = "--trainer.callbacks=tests.test_resume.StopAtBatch"
    run = (*RUN, "--trainer.accumulate_grad_batches", 3)
    maml(*run, spy, "--run.dir", tmp_path / "stopped")
    maml(*run, "--trainer.max_steps", 3, "--run.dir", tmp_path / "whole")
    stopped, whole = (checkpoint_tensors(tmp_path / name) for name in ("stopped", "whole"))
    assert int(stopped["meta_step"]) == 3
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
