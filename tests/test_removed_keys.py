"""What an earlier version wrote can still be read: keys that were removed are dropped from files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from maml_pipeline import MetaLearner
from maml_pipeline.cli import training_parser
from maml_pipeline.config_file import REMOVED_KEYS, drop_removed_keys
from maml_pipeline.run_folder import read_run_config
from maml_pipeline.runs import read
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Run
from maml_pipeline.varied import has_key
from tests.helpers import CONFIGS, SHORT, SHORT_NAME, TOY, Maml, meta_step
from tests.run_copies import copy_run
from tests.written_runs import write_run

NOTICE = "model.compile is no longer needed and is ignored\n"
FEW = SHORT[2:]  # without the config
VALUES = pytest.mark.parametrize("value", [True, False])


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """Let every test see the notice, which a process prints once."""
    training_parser.tell_once.cache_clear()
    yield
    training_parser.tell_once.cache_clear()


def with_removed_keys(file: Path, value: object) -> Path:
    """Write the removed keys into a configuration file."""
    config = yaml.safe_load(file.read_text())
    for key in REMOVED_KEYS:
        *parents, name = key.split(".")
        holder = config
        for parent in parents:
            holder = holder[parent]
        holder[name] = value
    file.write_text(yaml.safe_dump(config))
    return file


def old_config(folder: Path, value: object) -> Path:
    """Write the configuration file of an earlier version."""
    return with_removed_keys(Path(shutil.copy(CONFIGS / "toy.yaml", folder / "old.yaml")), value)


def no_removed_key(config: dict[str, Any]) -> bool:
    return not any(has_key(config, key) for key in REMOVED_KEYS)


@pytest.mark.parametrize("config", [None, [], "model", {}, {"model": None}, {"model": ["compile"]}])
def test_what_has_no_removed_key_is_left_alone(config: Any) -> None:
    before = json.dumps(config)
    assert drop_removed_keys(config) == [] and json.dumps(config) == before


@VALUES
def test_a_removed_key_is_dropped_and_named_if_it_asked_for_something(value: bool) -> None:
    config = {"model": {"compile": value, "inner_lr": 1}, "compile": True}
    assert drop_removed_keys(config) == (["model.compile"] if value else [])
    assert config == {"model": {"inner_lr": 1}, "compile": True}


@pytest.mark.integration
@VALUES
def test_an_old_file_trains_the_same_run(maml: Maml, tmp_path: Path, value: bool) -> None:
    maml("fit", "--config", old_config(tmp_path, value), *FEW)
    new, old = tmp_path / "new", tmp_path / "runs" / SHORT_NAME
    maml("fit", *SHORT, "--run.dir", new)
    written = yaml.safe_load((old / "config.yaml").read_text())
    assert written == yaml.safe_load((new / "config.yaml").read_text()) and no_removed_key(written)
    assert (old / "test.json").read_text() == (new / "test.json").read_text()


@VALUES
def test_the_notice_is_one_line(
    maml: Maml, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: bool
) -> None:
    config = old_config(tmp_path, value)
    for files in ((config,), (config, config), (json.dumps(yaml.safe_load(config.read_text())),)):
        training_parser.tell_once.cache_clear()
        flags = [part for file in files for part in ("--config", file)]
        with pytest.raises(SystemExit) as done:
            maml("fit", *flags, "--print_config")
        printed = capsys.readouterr()
        assert done.value.code == 0 and printed.err == (NOTICE if value else "")
        assert no_removed_key(yaml.safe_load(printed.out))


@pytest.mark.integration
@VALUES
def test_an_old_run_is_resumed_tested_loaded_exported_and_listed(
    maml: Maml, tmp_path: Path, value: bool
) -> None:
    maml("fit", *SHORT)
    folder = Path("runs", SHORT_NAME)
    tested = (folder / "test.json").read_text()
    with_removed_keys(folder / "config.yaml", value)
    own = ("--config", folder / "config.yaml")
    maml("test", *own)
    assert (folder / "test.json").read_text() == tested
    MetaLearner.from_run(folder)
    maml("export", folder, "net.safetensors")
    (row,) = json.loads(maml("runs", "--json"))
    assert row["meta_steps"] == 12
    maml("report", folder, "--out", "report")
    maml("fit", *own, "--trainer.max_steps", 16, "--ckpt_path", "last")
    assert meta_step(folder) == 16
    with_removed_keys(folder / "config.yaml", value)
    maml("fit", *SHORT, "--trainer.max_steps", 20, "--ckpt_path", "last")  # found by its settings
    assert meta_step(folder) == 20 and not Path("runs", f"{SHORT_NAME}-2").exists()


@pytest.mark.integration
@VALUES
def test_an_old_tradeoff_is_resumed(maml: Maml, tmp_path: Path, value: bool) -> None:
    grid = ("tradeoff", *SHORT, "--orders", "first,second", "--out", "grid")
    maml(*grid)
    finished, other = tmp_path / "grid" / "first-k1-s0", tmp_path / "grid" / "second-k1-s0"
    expected = [(run / "test.json").read_text() for run in (finished, other)]
    for folder in (tmp_path / "grid", finished):
        with_removed_keys(folder / "config.yaml", value)
    shutil.rmtree(other)
    maml(*grid)
    assert [(run / "test.json").read_text() for run in (finished, other)] == expected


@VALUES
def test_old_runs_are_compared_with_new_ones(tmp_path: Path, value: bool) -> None:
    new = write_run(tmp_path / "new")
    with_removed_keys(copy_run(new, tmp_path / "old") / "config.yaml", value)
    assert no_removed_key(read_run_config(tmp_path / "old"))
    one, other = find_runs([tmp_path]).runs
    assert no_removed_key(one.config) and no_removed_key(other.config)
    assert one.settings == other.settings


@VALUES
def test_old_summaries_and_wandb_logs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bool
) -> None:
    run = write_run(tmp_path / "run")
    config = yaml.safe_load(with_removed_keys(run / "config.yaml", value).read_text())
    history = [{"step": 99.0, "val/loss": 0.75, "val/loss_ci95": 0.125}]
    cell = {"folder": "cell", "config": config, "history": history, "test": {}}
    (tmp_path / "tradeoff.json").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setattr("maml_pipeline.learner.tracking.read_wandb_log", lambda log: (config, history))
    found: list[Run] = [
        *(read_cell() for _, read_cell in read.read_tradeoff(tmp_path / "tradeoff.json")),
        read.read_wandb_run([tmp_path / "run.wandb"]),
    ]
    assert len(found) == 2 and all(no_removed_key(each.config) for each in found)


@VALUES
@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", *TOY, "--model.compile", "{value}"),
        ("fit", *TOY, "--model.compile={value}"),
        ("fit", *TOY, "--model", '{"compile": {value}}'),
        ("tradeoff", *TOY, "--model.compile", "{value}"),
        ("tradeoff", *TOY, "--vary", "model.compile=true,false"),
    ],
)
def test_on_the_command_line_a_removed_key_is_refused_with_the_reason(
    maml_error: Maml, arguments: tuple[object, ...], value: bool
) -> None:
    text = str(value).lower()
    error = maml_error(*(str(argument).replace("{value}", text) for argument in arguments))
    assert error.endswith("; model.compile is no longer needed, leave it out")
