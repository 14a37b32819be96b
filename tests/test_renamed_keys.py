"""What an earlier version wrote can still be read: keys that were renamed have their present names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from maml_pipeline import MetaLearner
from maml_pipeline.cli import training_parser
from maml_pipeline.config_file import RENAMED_KEYS, read_config, rename_keys
from maml_pipeline.runs import read
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Run
from tests.helpers import CONFIGS, SHORT, SHORT_NAME, Maml, meta_step
from tests.run_copies import copy_run
from tests.written_runs import write_run

ANNEALED = {"first_order_steps": 3, "checkpoint_inner_steps": True}


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """Let every test see the notices, which a process prints once."""
    training_parser.tell_once.cache_clear()
    yield
    training_parser.tell_once.cache_clear()


def with_old_names(file: Path, **values: Any) -> Path:
    """Write keys of an earlier version into a configuration file, in place of the present ones."""
    config = yaml.safe_load(file.read_text())
    for key in ("first_order_meta_steps", "differentiated_steps", "method"):
        config["model"].pop(key, None)
    config["model"] |= {"first_order_steps": 0, "checkpoint_inner_steps": False} | values
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.parametrize("config", [None, [], "model", {}, {"model": None}, {"model": ["method"]}])
def test_what_has_no_renamed_key_is_left_alone(config: Any) -> None:
    before = json.dumps(config)
    assert rename_keys(config) == [] and json.dumps(config) == before


@pytest.mark.parametrize(
    ("model", "present"),
    [
        ({"checkpoint_inner_steps": True}, {"method": "checkpointed"}),
        ({"checkpoint_inner_steps": False}, {"method": "unrolled"}),
        ({"checkpoint_inner_steps": "x"}, {"method": "x"}),
        ({"checkpoint_inner_steps": True, "method": "hessian_free"}, {"method": "hessian_free"}),
        (
            {"checkpoint_inner_steps": True, "first_order": True},
            {"method": "unrolled", "first_order": True},
        ),
        ({"first_order_steps": 3, "inner_lr": 1}, {"first_order_meta_steps": 3, "inner_lr": 1}),
    ],
)
def test_a_renamed_key_keeps_its_meaning(model: dict[str, Any], present: dict[str, Any]) -> None:
    varied = {"run": {"varied": ["model.first_order_steps", "model.inner_lr"]}}
    config = {"model": model, **varied}
    old = [key for key in RENAMED_KEYS if key.partition(".")[2] in model]
    assert rename_keys(config) == old and config["model"] == present
    assert config["run"]["varied"] == ["model.first_order_meta_steps", "model.inner_lr"]
    assert rename_keys(config) == []


def test_an_old_file_describes_the_same_run_and_says_so_once(
    maml: Maml, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    new = tmp_path / "new.yaml"
    new.write_text((CONFIGS / "toy.yaml").read_text())
    old = with_old_names(tmp_path / "new.yaml", **ANNEALED).rename(tmp_path / "old.yaml")
    with pytest.raises(SystemExit):
        maml("fit", "--config", old, "--config", old, "--print_config")
    printed = capsys.readouterr()
    model = yaml.safe_load(printed.out)["model"]
    assert model["first_order_meta_steps"] == 3 and model["method"] == "checkpointed"
    assert printed.err.splitlines() == [
        f"{key} is {present} now" for key, (present, _) in RENAMED_KEYS.items()
    ]
    assert read_config(old, "config")["model"]["method"] == "checkpointed"


@pytest.mark.integration
def test_an_old_run_is_resumed_tested_loaded_and_listed(maml: Maml) -> None:
    maml("fit", *SHORT, "--model.first_order_meta_steps", 3, "--model.method", "checkpointed")
    folder = Path("runs", SHORT_NAME)
    tested = (folder / "test.json").read_text()
    with_old_names(folder / "config.yaml", **ANNEALED)
    own = ("--config", folder / "config.yaml")
    maml("test", *own)
    assert (folder / "test.json").read_text() == tested
    learner = MetaLearner.from_run(folder)
    assert learner.inner.method == "checkpointed" and learner.first_order_meta_steps == 3
    (row,) = json.loads(maml("runs", "--json", "--filter", "model.first_order_meta_steps=3"))
    assert row["order"] == "checkpointed"
    maml("fit", *own, "--trainer.max_steps", 16, "--ckpt_path", "last")
    assert meta_step(folder) == 16


@pytest.mark.integration
def test_an_old_tradeoff_is_finished(maml: Maml, tmp_path: Path) -> None:
    grid = ("tradeoff", *SHORT, "--orders", "first,checkpointed", "--out", "grid")
    maml(*grid)
    folders = [tmp_path / "grid", *(tmp_path / "grid" / f"{o}-k1-s0" for o in ("first", "checkpointed"))]
    for folder, checkpoints in zip(folders, (False, False, True), strict=True):
        with_old_names(folder / "config.yaml", checkpoint_inner_steps=checkpoints)
    written = [(folder / "test.json").stat().st_mtime_ns for folder in folders[1:]]
    maml(*grid)
    assert [(folder / "test.json").stat().st_mtime_ns for folder in folders[1:]] == written
    found = find_runs([tmp_path / "grid"]).runs
    assert [str(run.order) for run in found] == ["first", "checkpointed"]


def test_old_runs_are_compared_with_new_ones(tmp_path: Path) -> None:
    new = write_run(tmp_path / "new", first_order_meta_steps=3)
    copy = copy_run(new, tmp_path / "old")
    with_old_names(copy / "config.yaml", **ANNEALED)
    one, other = find_runs([tmp_path]).runs
    assert [str(run.order) for run in (one, other)] == ["second", "checkpointed"]
    assert one.settings == other.settings


def test_old_summaries_and_wandb_logs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_old_names(write_run(tmp_path / "run") / "config.yaml", **ANNEALED)
    config = yaml.safe_load(file.read_text())
    history = [{"step": 99.0, "val/loss": 0.75, "val/loss_ci95": 0.125}]
    cell = {"folder": "cell", "config": config, "history": history, "test": {}}
    (tmp_path / "tradeoff.json").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr("maml_pipeline.learner.tracking.read_wandb_log", lambda log: (config, history))
    found: list[Run] = [
        *(read_cell() for _, read_cell in read.read_tradeoff(tmp_path / "tradeoff.json")),
        read.read_wandb_run([tmp_path / "run.wandb"]),
    ]
    assert [str(run.order) for run in found] == ["checkpointed", "checkpointed"]
