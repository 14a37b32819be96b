"""Canaries: private parts of W&B still do what `learner/tracking/wandb_internals.py` relies on."""

import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import wandb

from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking import wandb_internals
from maml_pipeline.run_folder import WANDB_LOG, WANDB_LOGS

CHANGED = (
    f"W&B {version('wandb')} or wandb_workspaces {version('wandb-workspaces')} changed {{}}: "
    "see maml_pipeline/learner/tracking/wandb_internals.py"
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the log of an offline run of two meta-steps."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        settings = wandb.Settings(silent=True, console="off")
        with wandb.init(
            dir=folder, id="abcd", mode="offline", config={"a": {"b": 1}}, settings=settings
        ) as run:
            for step in range(2):
                run.log({"meta_step": step, "train/loss": 0.5}, step=step)
    logs = [*(folder / WANDB_LOGS).glob(f"offline-run-*/{WANDB_LOG}")]
    assert len(logs) == 1 and logs[0].stem == "run-abcd", CHANGED.format("where it writes its logs")
    deadline = time.monotonic() + 30
    while wandb_internals.is_empty(logs[0]) and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's service writes the log after `finish` has returned
    return logs[0]


def test_global_settings() -> None:
    settings = wandb_internals.global_settings()
    for name in ("base_url", "mode", "project", "run_group", "run_id", "run_name", "sweep_id"):
        assert hasattr(settings, name), CHANGED.format(f"its settings: there is no {name}")


def test_use_run_id_in_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_internals.global_settings(), "run_id", "before")
    wandb_internals.use_run_id_in_sweep("abcd")
    assert wandb.setup().settings.run_id == "abcd", CHANGED.format("how run_id is set")


def test_api_error() -> None:
    error = wandb_internals.api_error()
    assert issubclass(error, Exception), CHANGED.format("WandbApiFailedError")
    # Otherwise `except wandb.Error` is enough, and the function can be removed.
    assert not issubclass(error, wandb.Error), CHANGED.format("WandbApiFailedError: it is public")


@pytest.mark.integration
def test_is_offline_is_synced_and_is_empty(log: Path, tmp_path: Path) -> None:
    assert wandb_internals.is_offline(log), CHANGED.format("the folder of an offline run")
    assert not wandb_internals.is_synced(log), CHANGED.format("the marker of uploaded logs")
    assert not wandb_internals.is_empty(log), CHANGED.format("the size of a log")
    header = tmp_path / log.name
    header.write_bytes(log.read_bytes()[:7])
    assert wandb_internals.is_empty(header)


@pytest.mark.integration
def test_read_records(log: Path, tmp_path: Path) -> None:
    records = [*wandb_internals.read_records(log)]
    configs = [r["run"]["config"]["update"] for r in records if r["type"] == "run"]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    message = CHANGED.format("the output of `wandb leet inspect --json`")
    assert [config["a"] for config in configs] == [{"b": 1}], message
    assert [(row["meta_step"], row["train/loss"]) for row in rows] == [(0, 0.5), (1, 0.5)], message
    (tmp_path / "run-x.wandb").write_text("no log" * 100)
    with pytest.raises(UserError, match=r"run-x\.wandb cannot be read"):
        next(wandb_internals.read_records(tmp_path / "run-x.wandb"))


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module `workspaces`, which sends no requests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses deprecated functions of Pydantic
        import wandb_workspaces.workspaces as workspaces
    monkeypatch.setattr(wandb, "Api", lambda: None)
    return workspaces


@pytest.mark.parametrize("saved_id", ["", "view"])
def test_set_workspace_id(workspaces: Any, monkeypatch: pytest.MonkeyPatch, saved_id: str) -> None:
    sent = []
    node = {"id": saved_id, "displayName": "Orders", "spec": "{}"}

    def answer(_: object, query: object, variables: dict[str, Any]) -> dict[str, Any]:
        sent.append(variables)
        edges = [{"node": node}] if saved_id else []
        return {"project": {"allViews": {"edges": edges}}}

    monkeypatch.setattr(workspaces.internal, "execute_graphql", answer)
    monkeypatch.setattr(workspaces.internal, "validate_spec_version", lambda *_, **__: None)
    workspace = workspaces.Workspace(entity="someone", project="comparison", name="Orders")
    is_saved = wandb_internals.set_workspace_id(workspace, "nw-orders-v")
    assert sent[0]["viewName"] == "nw-orders-v", CHANGED.format("the internal name of a workspace")
    assert is_saved == bool(saved_id), CHANGED.format("get_view_dict")
    model = workspace._to_model()  # what `save` sends
    assert model.name == "nw-orders-v", CHANGED.format("_internal_name")
    assert model.id == saved_id, CHANGED.format("_internal_id")


def test_set_workspace_id_tells_a_missing_project(
    workspaces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspaces.internal, "execute_graphql", lambda *_: {"project": None})
    workspace = workspaces.Workspace(entity="someone", project="none", name="Orders")
    try:
        wandb_internals.set_workspace_id(workspace, "nw-orders-v")
    except wandb_internals.ProjectNotFoundError:
        return
    except ValueError as error:
        pytest.fail(CHANGED.format(f"get_view_dict's error: {error}"))
    pytest.fail(CHANGED.format("get_view_dict: it raises no error"))
