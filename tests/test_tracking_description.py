"""A W&B run is described by its config, its commit and its job."""

import subprocess
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import yaml

from maml_pipeline.learner.tracking.description import describe_run, git_state, provenance
from tests.helpers import CONFIGS


@pytest.mark.parametrize(
    ("config", "changes", "group", "name"),
    [
        ("omniglot/5way_1shot", {}, "omniglot-5w1s-k1", "omniglot-5w1s-second-s0"),
        ("omniglot/5way_1shot", {"inner_steps": 5}, "omniglot-5w1s-k5", "omniglot-5w1s-second-k5-s0"),
        ("sine", {"first_order": True}, "sine-10shot-k1", "sine-10shot-first-s0"),
        ("sine", {"method": "checkpointed"}, "sine-10shot-k1", "sine-10shot-checkpointed-s0"),
        ("sine", {"differentiated_steps": 1}, "sine-10shot-k1", "sine-10shot-truncated-1-s0"),
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
    defaults = {"method": "unrolled", "engine": "learn2learn"}
    model = values["model"] = {**defaults, **values["model"], **changes}
    about = describe_run(values, world_size=2)
    assert (about.group, about.name) == (group, name)
    assert {"world-size-2", model["engine"]} <= set(about.tags)
    assert (model["method"] in about.tags) == (model["method"] != "unrolled")


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
