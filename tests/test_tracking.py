"""W&B receives every metric once, and its errors never fail a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maml_pipeline.learner.tracking import find_wandb_logs, finish_tracking, read_wandb_log
from maml_pipeline.learner.tracking.run_id import claim_wandb_id
from maml_pipeline.learner.tracking.tracker import WandbTracker
from tests.documented_metrics import undocumented
from tests.helpers import Maml, maml_process, read_metrics
from tests.wandb_logs import (
    SHORT,
    assert_increasing,
    files_with,
    inspected,
    logged_steps,
    lowest,
    records,
    table_steps,
)
from tests.wandb_stand_in import API_KEY, StandIn, at


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
    assert set(summary["tags"]) == {"native", "world-size-1"}
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
    assert not undocumented(names)

    figures = summary["summary"]
    last = {name: value for row in history for name, value in row.items()}
    for name in ("val/loss", "train/loss", "val/loss_step_0"):
        assert figures[name] == {"min": pytest.approx(lowest(folder, name)), "last": last[name]}
    for name in ("test/loss", "memory/meta_step_peak_bytes", "speed/meta_step_ms", "order_gap/cosine"):
        assert figures[name] == last[name]


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
