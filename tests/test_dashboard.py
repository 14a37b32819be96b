"""`maml dashboard`: the requests of the real W&B client, panel by panel, and on a second call."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import maml_process
from tests.wandb_stand_in import API_KEY, ENTITY, at, stand_in

pytestmark = pytest.mark.integration

PROJECT = ("--entity", ENTITY, "--project", "comparison")
GROUPING = [{"section": "run", "name": "group"}, {"section": "run", "name": "jobType"}]
CURVE = {"xAxis": "meta_step", "aggregate": True, "groupAgg": "mean", "groupArea": "minmax"}
TABLE = [
    "run:displayName",
    "run:jobType",
    "summary:test/accuracy",
    "summary:test/accuracy_ci95",
    "summary:memory/meta_step_peak_bytes",
    "summary:speed/meta_step_ms",
    "summary:speed/meta_step_flops",
    "summary:order_gap/cosine",
]
PANELS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "What second order buys, and what it costs",
        "Scatter Plot",
        {"xAxis": "summary:memory/meta_step_peak_bytes", "yAxis": "summary:test/accuracy"},
    ),
    (
        "What second order buys, and what it costs",
        "Run History Line Plot",
        {**CURVE, "metrics": ["val/accuracy"]},
    ),
    ("Order gap", "Run History Line Plot", {**CURVE, "metrics": ["order_gap/cosine"]}),
    ("Order gap", "Run History Line Plot", {**CURVE, "metrics": ["order_gap/relative_error"]}),
    (
        "Inner steps",
        "Bar Chart",
        {"metrics": [f"summary_metrics.test/accuracy_step_{k}" for k in range(3)], "vertical": True},
    ),
    ("Final figures", "Run Comparer", {"diffOnly": "split"}),
]


def assert_panels(shown: list[tuple[str, dict[str, Any]]]) -> None:
    assert len(shown) == len(PANELS)
    for (section, panel), (wanted_section, kind, config) in zip(shown, PANELS, strict=True):
        assert (section, panel["viewType"]) == (wanted_section, kind)
        assert panel["config"] | config == panel["config"], section


def test_a_workspace_and_a_report_are_created_once_and_then_updated() -> None:
    with stand_in() as server:
        first = maml_process("dashboard", *PROJECT, "--inner_steps", 2, **at(server))
        made = {view["id"]: view["spec"] for view in server.views}
        again = maml_process("dashboard", *PROJECT, "--inner_steps", 2, **at(server))
        other = maml_process("dashboard", *PROJECT, "--measure", "loss", **at(server))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    workspace, report, *of_loss = server.views
    assert [view["id"] for view in (workspace, report)] == [*made]
    assert other.returncode == 0 and len(of_loss) == 2
    assert first.stdout == (
        f"Workspace: {server.url}/{ENTITY}/comparison?nw=mamlordersaccuracy\n"
        f"Report: {server.url}/{ENTITY}/comparison/reports/Gradient-orders-by-accuracy--{report['id']}\n"
    )
    assert (workspace["type"], report["type"]) == ("project-view", "runs")

    section = json.loads(workspace["spec"])["section"]
    (runs,) = section["runSets"]
    assert runs["grouping"] == GROUPING
    assert runs["runFeed"]["columnOrder"] == TABLE
    assert section["settings"]["xAxis"] == "meta_step"
    sections = section["panelBankConfig"]["sections"]
    assert_panels([(part["name"], panel) for part in sections for panel in part["panels"]])

    shown, heading, tables = [], "", []
    for block in json.loads(report["spec"])["blocks"]:
        if block["type"] == "heading":
            heading = block["children"][0]["text"]
        elif block["type"] == "panel-grid":
            (runs,) = block["metadata"]["runSets"]
            assert runs["grouping"] == GROUPING
            assert runs["project"]["name"] == "comparison"
            shown += [(heading, p) for p in block["metadata"]["panelBankSectionConfig"]["panels"]]
            tables += [] if block["metadata"]["hideRunSets"] else [runs["runFeed"]["columnOrder"]]
    assert_panels(shown)
    assert tables == [TABLE]
    assert "val/loss" in of_loss[0]["spec"] and "val/loss" in of_loss[1]["spec"]


def test_a_missing_project_is_a_user_error() -> None:
    with stand_in() as server:
        stranger = maml_process("dashboard", "--entity", ENTITY, "--project", "unheard_of", **at(server))
        assert server.views == []
    assert stranger.returncode != 0
    assert "there is no project someone/unheard_of" in stranger.stderr.strip().splitlines()[-1]


def test_a_missing_account_or_network_is_a_user_error(
    maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "needs a W&B account: run `wandb login`" in maml_error("dashboard", *PROJECT)
    assert "--entity" in maml_error("dashboard", "--project", "comparison")
    assert "inner_steps is -1" in maml_error("dashboard", *PROJECT, "--inner_steps", -1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    done = maml_process(
        "dashboard", *PROJECT, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=API_KEY
    )
    assert done.returncode != 0 and "W&B does not answer" in done.stderr
