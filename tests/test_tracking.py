"""W&B: descriptions, each meta-step logged once, and errors that never fail a run."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml

from maml_pipeline.learner.tracking import find_wandb_logs, finish_tracking, read_wandb_log
from maml_pipeline.learner.tracking.description import describe_run, git_state, provenance
from maml_pipeline.learner.tracking.run_id import claim_wandb_id, read_wandb_id
from maml_pipeline.learner.tracking.tracker import WandbTracker
from maml_pipeline.learner.tracking.wandb_internals import is_empty
from maml_pipeline.locks import is_locked
from tests.helpers import CONFIGS, Maml, maml_command, maml_process, process_environment, read_metrics
from tests.test_metrics_doc import DOCUMENTED, pattern
from tests.wandb_stand_in import API_KEY, StandIn, at, stand_in

TOY = ("fit", "--config", CONFIGS / "toy.yaml", "--trainer.enable_progress_bar", "false")
FEW = (*TOY, "--data.val_tasks", 16, "--data.test_tasks", 16)
SHORT = (*FEW, "--trainer.max_steps", 12, "--trainer.val_check_interval", 4, "--probes.every", 11)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


def inspected(log: Path, *flags: str) -> str:
    """Read a log with W&B's own reader."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", *flags, "--json", str(log)]
    return subprocess.run(reader, check=True, capture_output=True, text=True).stdout


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, inspected(log).splitlines())
    return [line[kind] for line in lines if line["type"] == kind]


def table_steps(folder: Path) -> list[int]:
    return sorted({int(row["step"]) for row in read_metrics(folder)})


def lowest(folder: Path, metric: str) -> float:
    return min(float(row[metric]) for row in read_metrics(folder) if row[metric])


def logged_steps(*logs: Path) -> list[int]:
    return [int(row["step"]) for log in logs for row in read_wandb_log(log)[1]]


def assert_increasing(steps: list[int]) -> None:
    assert steps and all(earlier < later for earlier, later in pairwise(steps))


def files_with(key: str, folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if key.encode() in path.read_bytes()]


@pytest.mark.integration
def test_an_offline_run_has_description_metrics_and_summary(
    maml: Maml, tmp_path: Path, offline: None
) -> None:
    folder = tmp_path / "run"
    maml(*SHORT, "--run.dir", folder)
    ((log,),) = find_wandb_logs(folder).values()
    (run,), summary = records(log, "run"), json.loads(inspected(log, "--summary"))

    assert (run["run_group"], run["job_type"]) == ("toy-k1", "second")
    assert run["display_name"] == "toy-second-s0"
    assert set(summary["tags"]) == {"learn2learn", "world-size-1"}
    assert run["run_id"] == (folder / "wandb_id.txt").read_text().strip()

    config = summary["config"]
    made_with = config.pop("made_with")
    assert config == yaml.safe_load((folder / "config.yaml").read_text())
    assert made_with["packages"]["torch"] and made_with["device"] and made_with["world_size"] == 1

    axes = {
        metric.get("name") or metric["glob_name"]: metric.get("step_metric")
        for metric in records(log, "metric")
    }
    assert axes.pop("meta_step") is None
    assert axes["*"] == "meta_step" and set(axes.values()) == {"meta_step"}

    _, history = read_wandb_log(log)
    steps = [int(row["step"]) for row in history]
    assert_increasing(steps)
    assert steps == table_steps(folder)
    names = {name for row in history for name in row} - {"step"}
    assert names == set(read_metrics(folder)[0]) - {"step"}
    assert not {n for n in names if not any(re.fullmatch(pattern(d), n) for d in DOCUMENTED)}

    figures = summary["summary"]
    last = {name: value for row in history for name, value in row.items()}
    for name in ("val/loss", "train/loss", "val/loss_step_0"):
        assert figures[name] == {"min": pytest.approx(lowest(folder, name)), "last": last[name]}
    for name in ("test/loss", "memory/meta_step_peak_bytes", "speed/meta_step_ms", "order_gap/cosine"):
        assert figures[name] == last[name]


@pytest.mark.parametrize(
    ("config", "changes", "group", "name"),
    [
        ("omniglot/5way_1shot", {}, "omniglot-5w1s-k1", "omniglot-5w1s-second-s0"),
        ("omniglot/5way_1shot", {"inner_steps": 5}, "omniglot-5w1s-k5", "omniglot-5w1s-second-k5-s0"),
        ("sine", {"first_order": True}, "sine-10shot-k1", "sine-10shot-first-s0"),
        ("sine", {"checkpoint_inner_steps": True}, "sine-10shot-k1", "sine-10shot-checkpointed-s0"),
        ("toy", {}, "toy-k1", "toy-second-s0"),
    ],
)
def test_group_name_and_tags_follow_from_the_config(
    config: str, changes: dict[str, Any], group: str, name: str
) -> None:
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    tasks = values["data"]["tasks"]
    named = resolve_name(tasks["class_path"])(**tasks["init_args"])
    values["run"]["experiment"] = named.name  # as in the resolved config
    defaults = {"compile": False, "checkpoint_inner_steps": False, "engine": "learn2learn"}
    model = values["model"] = {**defaults, **values["model"], **changes}
    about = describe_run(values, world_size=2)
    assert (about.group, about.name) == (group, name)
    assert {"world-size-2", model["engine"]} <= set(about.tags)
    assert ("checkpointed" in about.tags) == model["checkpoint_inner_steps"]
    assert ("compiled" in about.tags) == model["compile"]


@pytest.mark.integration
def test_the_git_commit_is_recorded_if_there_is_one(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": state["commit"], "dirty": True}


def test_slurm_ids_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "slurm" not in provenance(torch.device("cpu"), 1)
    for name, value in (("JOB_ID", "7"), ("ARRAY_JOB_ID", "5"), ("ARRAY_TASK_ID", "2")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    kept = provenance(torch.device("cpu"), 1)["slurm"]
    assert kept == {"job_id": "7", "array_job_id": "5", "array_task_id": "2"}


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


def wandb_id(folder: Path) -> str:
    return (folder / "wandb_id.txt").read_text().strip()


@pytest.mark.integration
def test_a_tradeoff_is_one_group_with_a_job_type_per_order(
    maml: Maml, tmp_path: Path, offline: None
) -> None:
    maml("tradeoff", *SHORT[1:], "--out", tmp_path / "all")
    runs = [records(log, "run")[0] for (log,) in find_wandb_logs(tmp_path / "all").values()]
    assert {run["run_group"] for run in runs} == {"toy-k1"}
    assert sorted(run["job_type"] for run in runs) == ["checkpointed", "first", "second"]
    assert len({run["run_id"] for run in runs}) == 3


@pytest.mark.integration
def test_two_ranks_write_one_run(tmp_path: Path) -> None:
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--run.dir", tmp_path / "run")
    done = maml_process(*SHORT, *ranks, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    ((log,),) = find_wandb_logs(tmp_path).values()
    assert "world-size-2" in records(log, "run")[0]["tags"]
    assert_increasing(logged_steps(log))


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


@pytest.mark.integration
def test_an_offline_run_stores_requested_artifacts_but_no_api_key(
    tmp_path: Path, server: StandIn
) -> None:
    asked = ("--run.artifacts", "true", "--run.dir", tmp_path / "run")
    done = maml_process(*SHORT, *asked, WANDB_MODE="offline", WANDB_API_KEY=API_KEY)
    assert done.returncode == 0 and API_KEY not in done.stdout + done.stderr
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert files_with(API_KEY, tmp_path) == []
    assert maml_process("sync", tmp_path, **at(server)).returncode == 0
    assert sorted(kind for kind, _ in server.artifacts) == ["model", "report"]


@pytest.mark.integration
@pytest.mark.parametrize("trouble", ["no network", pytest.param("another key", marks=pytest.mark.slow)])
def test_without_wandb_access_the_run_is_offline_with_one_warning(
    trouble: str, tmp_path: Path, server: StandIn
) -> None:
    key = API_KEY if trouble == "no network" else API_KEY[::-1]
    url = "http://127.0.0.1:9" if trouble == "no network" else server.url
    done = maml_process(*SHORT, "--run.dir", tmp_path / "run", WANDB_BASE_URL=url, WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B cannot be reached") == 1
    assert (tmp_path / "run" / "test.json").exists()
    (logs,) = find_wandb_logs(tmp_path / "run").values()
    assert logs[-1].parent.name.startswith("offline-")
    assert logged_steps(logs[-1]) == table_steps(tmp_path / "run")
    assert files_with(key, tmp_path) == []
    assert maml_process("sync", tmp_path, **at(server)).returncode == 0
    ((_, run),) = server.runs.items()
    assert [row["meta_step"] for row in run.history] == table_steps(tmp_path / "run")


def test_a_failing_log_call_ends_only_the_tracking(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionResetError("the service is gone")

    tracker = WandbTracker(
        tmp_path, {}, id_file=tmp_path / "wandb_id.txt", metrics_file=tmp_path / "metrics.csv"
    )
    tracker.run = Broken()  # type: ignore[assignment]
    for step in range(3):
        tracker.log_metrics({"train/loss": 1.0}, step)
    tracker.finalize("success")
    assert caplog.text.count("the service is gone") == 1
    assert not tracker.uploads_artifacts(True)


@pytest.mark.integration
def test_sync_rejects_missing_runs_and_keys(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "nowhere does not exist" in maml_error("sync", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty holds no W&B run" in maml_error("sync", "empty")
    log = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-abcd" / "run-abcd.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(bytes(100))
    assert "no API key here; run `wandb login`" in maml_error("sync", "run")
    claim_wandb_id(tmp_path / "run" / "wandb_id.txt", "abcd")
    assert "run is still being trained" in maml("sync", "run")
    finish_tracking()
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "was not uploaded" in maml_error("sync", "run")
