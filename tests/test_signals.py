"""A signal saves the state and requeues the job, or ends the command with a nonzero exit status."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule, cli, slurm
from maml_pipeline.cli import training
from maml_pipeline.derivation import derive
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.runs.results import ResultTable
from maml_pipeline.signals import SIGNALS, Stopped
from maml_pipeline.tasks import Lines
from maml_pipeline.tradeoff import cells
from tests.helpers import CONFIGS, Maml, assert_same_run, make_trainer, run_python

pytestmark = pytest.mark.integration

FIT = (
    *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", "run"),
    *("--trainer.max_steps", 30, "--trainer.val_check_interval", 10, "--trainer.log_every_n_steps", 5),
    *("--data.val_tasks", 4, "--data.test_tasks", 4, "--trainer.enable_progress_bar", "false"),
    *("--probes.memory", "false", "--probes.speed", "false"),
)
PLACES = {
    "importing": (cli, "import_command"),
    "parsing": (training.TrainingCommand, "parse_arguments"),
    "preparing data": (TaskDataModule, "prepare_data"),
    "opening the folder": (training, "open_run_folder"),
    "setting up": (TaskDataModule, "setup"),
    "building the optimizer": (MetaLearner, "configure_optimizers"),
    "the first meta-step": (MetaLearner, "training_step"),
    "validation": (MetaLearner, "on_validation_epoch_start"),
    "the test": (MetaLearner, "on_test_epoch_start"),
    "the result": (ResultTable, "on_test_end"),
    "artifacts": (training, "attach_artifacts"),
    "finishing W&B": (training, "finish_tracking"),
}


class CallbackOrder(Checkpoint):
    """Records the names of the callbacks in the order in which Lightning calls them."""

    names: ClassVar[list[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.names[:] = [type(callback).__name__ for callback in callbacks]


def test_the_last_state_is_saved_after_every_other_callback(maml: Maml) -> None:
    # Also after a `Checkpoint` callback that the user adds.
    maml(*FIT, "--trainer.callbacks=tests.test_signals.CallbackOrder")
    names = CallbackOrder.names
    assert names.index("StopOnSignal") < names.index("CallbackOrder")
    assert names[-3:] == ["EndEarly", "BestCheckpoint", "LastCheckpoint"]


class SignalAtCall:
    """Sends this process a signal at the first call of a function, before the function runs."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, signum: int) -> None:
        original = getattr(owner, name)
        self.is_hit = False

        def spy(*args: Any, **kwargs: Any) -> Any:
            if not self.is_hit:
                self.is_hit = True
                os.kill(os.getpid(), signum)
            return original(*args, **kwargs)

        patch.setattr(owner, name, spy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        cli.main([*map(str, FIT), "--run.dir", str(folder)])
    return folder


def exit_status(maml: Maml, *arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        maml(*arguments)
    return int(stopped.value.code or 0)


# At every stage of a command --------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", [place for place in PLACES if place != "importing"])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_sets_the_exit_status_of_a_fit_which_then_resumes_exactly(
    maml: Maml, tmp_path: Path, whole: Path, place: str, signum: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        spy = SignalAtCall(patch, *PLACES[place], signum)
        assert exit_status(maml, *FIT) == 128 + signum
        assert spy.is_hit
    if signum == signal.SIGTERM:
        has_state = (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
        maml(*FIT, *(["--ckpt_path", "last"] if has_state else []))
        assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_requeues_a_slurm_job(maml: Maml, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    asked: list[str | None] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def requeue(stop: Stopped) -> bool:
        asked.append(slurm.job_id())
        return True

    monkeypatch.setattr(slurm, "requeue", requeue)
    spy = SignalAtCall(monkeypatch, *PLACES[place], signal.SIGUSR1)
    assert exit_status(maml, *FIT) == 0
    assert spy.is_hit and asked == ["7"]


def test_a_job_that_cannot_be_requeued_does_not_count_as_completed(
    maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "requeue", lambda stop: False)
    SignalAtCall(monkeypatch, *PLACES["validation"], signal.SIGUSR1)
    assert exit_status(maml, *FIT) == 128 + signal.SIGUSR1


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("command", ["test", "validate", "report", "derive"])
def test_a_signal_sets_the_exit_status_of_the_other_commands(
    maml: Maml,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    signum: int,
) -> None:
    measure = ("--config", whole / "config.yaml", "--run.dir", whole, "--ckpt_path", "last")
    arguments = {"test": measure, "validate": measure, "report": (whole,), "derive": ()}
    places = {
        "test": (MetaLearner, "test_step"),
        "validate": (MetaLearner, "validation_step"),
        "report": (Path, "mkdir"),
        "derive": (derive, "derive"),
    }
    spy = SignalAtCall(monkeypatch, *places[command], signum)
    assert exit_status(maml, command, *arguments[command]) == 128 + signum
    assert spy.is_hit
    # There is nothing to resume.
    assert capsys.readouterr().err == f"maml: stopped by {signal.Signals(signum).name}\n"


def test_a_signal_swallowed_by_a_library_still_sets_the_exit_status(
    maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(*args: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            return

    monkeypatch.setattr(training, "attach_artifacts", swallow)
    assert exit_status(maml, *FIT) == 128 + signal.SIGTERM


def test_lightning_installs_no_signal_handler(maml: Maml, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        ResultTable, "on_test_end", lambda *_: seen.append(signal.getsignal(signal.SIGTERM))
    )
    before = signal.getsignal(signal.SIGTERM)
    maml(*FIT)
    assert seen[0].__module__ == "maml_pipeline.signals"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_users_trainer_gets_its_signal_handlers_back() -> None:
    class Seen(Callback):
        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[Any] = []
    before = [signal.getsignal(signum) for signum in SIGNALS]
    lightning = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[StopOnSignal(), Seen()])
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    lightning.fit(learner, datamodule=TaskDataModule(Lines(), 2))
    assert seen[0].__module__ == "maml_pipeline.signals"
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


# During imports and in C code -----------------------------------------------------------------------


@pytest.mark.parametrize("imported", ["maml_pipeline.cli.training", "numpy._core._multiarray_umath"])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_during_the_imports_is_one_line(signum: int, imported: str) -> None:
    ended = run_python(f"""
        import importlib.abc, os, sys
        from maml_pipeline.cli import main

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == {imported!r}:
                    os.kill(os.getpid(), {int(signum)})

        sys.meta_path.insert(0, Finder())
        main(["fit", "--config", "toy"])
    """)
    assert ended.returncode == 128 + signum
    assert ended.stderr == f"maml: stopped by {signal.Signals(signum).name} while it was starting\n"


@pytest.mark.parametrize("imported", ["torch._dynamo.polyfills.loader", "pytorch_lightning.trainer"])
def test_a_signal_during_the_late_imports_of_a_command_is_one_line(imported: str) -> None:
    ended = run_python(f"""
        import importlib.abc, os, signal, sys
        from maml_pipeline.cli import main

        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == {imported!r}:
                    sys.meta_path.remove(self)
                    os.kill(os.getpid(), signal.SIGTERM)

        sys.meta_path.insert(0, Finder())
        main(["tradeoff", "--config", "toy"])
    """)
    assert ended.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(r"maml: stopped by SIGTERM( while it was starting)?\n", ended.stderr)


WHILE_C_CODE_RUNS = """
    import hashlib, os, signal, threading
    from maml_pipeline import signals

    def send(count):
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGINT)
            # The first is acknowledged although Python's own handlers wait for the C code.
            {between}

    with signals.listening(signals.Response.EXIT):
        signals.respond(signals.Response.NOTE, announces=True)
        threading.Thread(target=send, args=[{count}]).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
        print("C code has returned", signals.requested().name, flush=True)
"""


def test_the_first_ctrl_c_is_acknowledged_while_c_code_runs() -> None:
    script = WHILE_C_CODE_RUNS.format(between="pass", count=1, rounds=1_000_000)
    ended = run_python(script)
    assert ended.stderr == "Stopping after the current meta-step; Ctrl-C again to stop at once\n"
    assert ended.stdout == "C code has returned SIGINT\n" and ended.returncode == 0


def test_the_second_ctrl_c_ends_a_process_that_stays_in_c_code() -> None:
    script = WHILE_C_CODE_RUNS.format(
        between="import time; time.sleep(0.2)", count=2, rounds=1_000_000_000
    )
    ended = run_python(script)
    assert ended.returncode == 128 + signal.SIGINT
    assert ended.stderr.endswith("maml: interrupted\n") and not ended.stdout


def test_the_second_ctrl_c_ends_a_process_even_if_a_library_catches_it() -> None:
    ended = run_python("""
        import atexit, os, signal, sys, types
        from maml_pipeline import cli, signals

        def run(arguments):
            signals.respond(signals.Response.NOTE)
            atexit.register(print, "a library takes its time")
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                sys.exit(1)

        module = types.ModuleType("maml_pipeline.cli.derive")  # a command that imports nothing slow
        module.run = run
        sys.modules[module.__name__] = module
        cli.main(["derive"])
    """)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGINT, "")
    assert ended.stderr == "maml: interrupted\n"


def test_nohup_keeps_a_closed_terminal_from_ending_a_run() -> None:
    ended = run_python(
        """
        import os, signal
        from maml_pipeline import signals
        with signals.listening(signals.Response.EXIT):
            os.kill(os.getpid(), signal.SIGHUP)
            print(signals.requested())
        """,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert (ended.returncode, ended.stdout) == (0, "None\n")


# A trade-off and its training ---------------------------------------------------------------------

CELL = """
import signal, sys, time
def end(signum, frame):
    print("ended cleanly", flush=True)
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, end)
print("trains", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_a_tradeoff_and_its_training(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    log = tmp_path / "grid" / "first-k1-s0" / "log.txt"

    def watch(folder: Path) -> int:
        if log.exists() and "trains" in log.read_text():
            os.kill(os.getpid(), signum)
        return 0

    monkeypatch.setattr(cells, "fit_command", lambda *_: [sys.executable, "-c", CELL])
    monkeypatch.setattr(cells, "meta_steps_done", watch)
    arguments = ("--orders", "first,second", "--out", "grid")
    assert exit_status(maml, "tradeoff", *FIT[1:3], *arguments) == 128 + signum
    assert log.read_text() == "trains\nended cleanly\n"
    assert not (tmp_path / "grid" / "second-k1-s0").exists()
