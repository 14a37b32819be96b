"""A resumed run keeps its W&B id, and each meta-step is logged once."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from maml_pipeline.learner.tracking import find_wandb_logs, finish_tracking
from maml_pipeline.learner.tracking.run_id import claim_wandb_id, read_wandb_id
from maml_pipeline.learner.tracking.wandb_internals import is_empty
from maml_pipeline.locks import is_locked
from tests.helpers import Maml, maml_command, maml_process, process_environment, read_metrics
from tests.wandb_logs import (
    FEW,
    SHORT,
    assert_increasing,
    files_with,
    logged_steps,
    lowest,
    table_steps,
    wandb_id,
)
from tests.wandb_stand_in import API_KEY, StandIn, at


def stop_after(rows: int, signum: signal.Signals, folder: Path, *arguments: object) -> None:
    """Run the command and send it a signal after it has logged `rows` more rows."""

    def logged() -> int:
        return len(read_metrics(folder)) if (folder / "metrics.csv").exists() else 0

    before, deadline = logged(), time.monotonic() + 120
    variables = process_environment(WANDB_MODE="offline")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(maml_command(*arguments), env=variables, **quiet) as process:  # type: ignore[call-overload]
        while logged() < before + rows and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signum)
    assert process.returncode != 0


@pytest.mark.integration
def test_a_run_stopped_twice_keeps_one_id_and_logs_each_meta_step_once(
    maml: Maml, tmp_path: Path, offline: None, server: StandIn
) -> None:
    folder = tmp_path / "run"
    long = (*FEW, "--run.dir", folder, "--run.checkpoint_every", 20, "--trainer.max_steps", 900)
    stop_after(30, signal.SIGKILL, folder, *long)
    stop_after(20, signal.SIGTERM, folder, *long, "--ckpt_path", "last")
    maml(*long, "--ckpt_path", "last")

    (logs,) = find_wandb_logs(folder).values()
    assert len(logs) == 3
    steps = logged_steps(*logs)
    assert_increasing(steps)
    assert steps == table_steps(folder)

    synced = maml_process("sync", folder, **at(server))
    assert synced.stdout.endswith("Runs uploaded: 1\n"), synced.stderr
    ((run_id, run),) = server.runs.items()
    assert run_id == (folder / "wandb_id.txt").read_text().strip()
    assert [row["meta_step"] for row in run.history] == steps
    assert [row["_step"] for row in run.history] == steps
    asked = [name for name, _ in server.operations if name in ("UpsertBucket", "RunResumeStatus")]
    # Every part but the first resumes the run. A killed process may not have written any records.
    parts = [log for log in logs if not is_empty(log)]
    assert asked.count("RunResumeStatus") == len(parts) - 1 > 0 and asked[0] == "UpsertBucket"
    assert run.summary["val/loss"]["min"] == pytest.approx(lowest(folder, "val/loss"))
    assert "Nothing to upload" in maml_process("sync", folder, **at(server)).stdout
    assert [row["meta_step"] for row in run.history] == steps


@pytest.mark.integration
def test_resuming_from_the_best_checkpoint_starts_a_new_wandb_run(
    maml: Maml, tmp_path: Path, offline: None
) -> None:
    folder = tmp_path / "run"
    # Mode max selects the worst checkpoint, which is not the last one.
    worst = (*SHORT, "--run.dir", folder, "--run.mode", "max")
    maml(*worst)
    maml(*worst, "--ckpt_path", "best")
    first, second = find_wandb_logs(folder).values()
    assert len(first) == len(second) == 1
    newest = next(logs for logs in (first, second) if logs[0].stem[4:] in wandb_id(folder))
    assert logged_steps(*newest) == table_steps(folder)


@pytest.mark.integration
@pytest.mark.parametrize("resumed_in", ["the sweep", "no sweep"])
def test_a_sweep_run_keeps_the_agents_id_after_resuming(
    resumed_in: str, maml: Maml, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    settings = wandb.setup().settings  # W&B reads the variables once per process
    monkeypatch.setattr(settings, "sweep_id", "sweep1")
    monkeypatch.setattr(settings, "run_id", "trial1")
    folder = tmp_path / "run"
    maml(*SHORT, "--run.dir", folder)
    assert wandb_id(folder) == "trial1"
    settings.sweep_id, settings.run_id = ("sweep1" if resumed_in == "the sweep" else None), "trial2"
    maml(*SHORT, "--run.dir", folder, "--trainer.max_steps", 20, "--ckpt_path", "last")
    assert wandb_id(folder) == "trial1"
    (logs,) = find_wandb_logs(folder).values()
    assert [log.name for log in logs] == ["run-trial1.wandb"] * 2
    steps = logged_steps(*logs)
    assert_increasing(steps)
    # The first half ended with a test after meta-step 12, which W&B keeps.
    assert [step for step in steps if step != 12] == table_steps(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a\nb\n", b"a b\n", b"a/b\n", b"\xff\x00\n", b"x" * 200]
)
def test_an_invalid_id_is_ignored(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "wandb_id.txt"
    file.write_bytes(content)
    assert read_wandb_id(file) is None
    claim_wandb_id(file, "abcd")
    assert read_wandb_id(file) == "abcd" and is_locked(file)
    finish_tracking()
    assert not is_locked(file)
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_id.txt"]


@pytest.mark.integration
def test_a_new_id_replaces_an_empty_one_and_receives_the_whole_history(
    maml: Maml, tmp_path: Path, offline: None
) -> None:
    folder = tmp_path / "run"
    maml(*SHORT, "--run.dir", folder)
    (folder / "wandb_id.txt").write_text("")
    maml(*SHORT, "--run.dir", folder, "--trainer.max_steps", 20, "--ckpt_path", "last")
    new = wandb_id(folder)
    assert re.fullmatch("[0-9a-f]{8}", new)
    (log,) = (
        log for logs in find_wandb_logs(folder).values() for log in logs if log.stem == f"run-{new}"
    )
    assert logged_steps(log) == table_steps(folder)


@pytest.mark.integration
def test_an_online_run_resumes_with_its_id(tmp_path: Path, server: StandIn) -> None:
    folder = ("--run.dir", tmp_path / "run")
    assert maml_process(*SHORT, *folder, **at(server)).returncode == 0
    longer = ("--trainer.max_steps", 40, "--ckpt_path", "last")
    resumed = maml_process(*SHORT, *folder, *longer, **at(server))
    assert resumed.returncode == 0
    assert "less than the current step" not in resumed.stderr

    ((run_id, run),) = server.runs.items()
    assert run_id == wandb_id(tmp_path / "run")
    assert (run.fields["groupName"], run.fields["jobType"]) == ("toy-k1", "second")
    steps = [row["meta_step"] for row in run.history]
    assert_increasing(steps)
    assert steps[-1] == 40 and "test/loss" in run.history[-1]
    assert set(server.artifacts) == {("model", f"model-{run_id}"), ("report", f"report-{run_id}")}
    assert files_with(API_KEY, tmp_path) == []
    assert "Nothing to upload" in maml_process("sync", tmp_path, **at(server)).stdout
