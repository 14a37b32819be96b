"""The tables of docs/results.md are those of the committed results, and scripts that write them run."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maml_pipeline.cli import main
from scripts.reproduce import inner_steps, omniglot, sine, time_to_accuracy
from scripts.reproduce.places import parse_places
from scripts.reproduce.release import TRAININGS, release, release_name
from scripts.reproduce.results import merged_results, read_results, reproduce, results_of
from scripts.reproduce.summary import summary
from scripts.reproduce.tables import search_table, table
from scripts.reproduce.training import Training
from tests.helpers import ROOT

TABLES = {
    "sine.json": sine.STEPS,
    "omniglot.json": omniglot.STEPS,
    "inner_steps.json": inner_steps.STEPS,
}


def test_the_tables_are_those_of_the_committed_results() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    for file in (ROOT / "results").glob("*.json"):
        results = json.loads(file.read_text())
        if file.name == "map.json":
            continue  # tests/test_map.py compares it
        if file.name == "time_to_accuracy.json":
            assert time_to_accuracy.table(results) in text
            continue
        assert results and table(results, TABLES[file.name]) in text
        for row in results:
            if "search" in row:
                assert search_table(row["task"], row["measure"], row["search"]) in text


def test_the_readme_shows_rows_of_these_tables() -> None:
    section = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    known = (ROOT / "docs" / "results.md").read_text() + "\n" + summary(ROOT / "results")
    assert rows and {*rows} <= {*known.splitlines()} and summary(ROOT / "results") in section


def test_learning_curves_are_drawn_from_the_committed_results() -> None:
    results = read_results(ROOT / "results" / "omniglot.json")
    figure = omniglot.draw_learning_curves(results)
    lines = {ax.get_title(loc="left"): ax.get_lines() for ax in figure.axes}
    for task, of_task in lines.items():
        rows = [row for row in results if row["task"].removeprefix("Omniglot ") == task]
        assert [line.get_label() for line in of_task] == [row["method"] for row in rows]
        for line, row in zip(of_task, rows, strict=True):
            assert np.array_equal(line.get_xydata().T, [*row["validation"].values()])  # type: ignore[union-attr]
    assert len(lines) == len({row["task"] for row in results})


def test_every_network_of_a_release_has_a_name_of_its_own() -> None:
    names = [release_name(training, order) for training in TRAININGS for order in training.methods]
    assert len({*names}) == len(names)


def test_a_trial_writes_nothing_where_results_are() -> None:
    _, places = parse_places(ArgumentParser(), Path("runs/map"), "map.json", [])
    assert (places.runs, places.results) == (Path("runs/map"), Path("results/map.json"))
    assert places.picture(Path("docs/map.png")) == Path("docs/map.png")
    _, trial = parse_places(ArgumentParser(), Path("runs/map"), "map.json", ["--tiny"])
    assert (trial.runs, trial.results) == (Path("runs/trial"), Path("runs/trial/map.json"))
    assert trial.picture(Path("docs/map.png")) == Path("runs/trial/map.png")
    _, elsewhere = parse_places(
        ArgumentParser(), Path("runs/map"), "map.json", ["--results=/tmp/m.json"]
    )
    assert elsewhere.picture(Path("docs/map.png")) == Path("/tmp/map.png")


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_training_is_a_valid_tradeoff(
    training: Training,
    tiny: bool,
    tmp_path: Path,
    synthetic_omniglot: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MAML_OMNIGLOT_ROOT", str(synthetic_omniglot))
    if training.search:
        main([*training.search_command(tmp_path, tiny), "--dry_run"])
    else:
        main([*training.command(tmp_path, tiny), "--dry_run"])
    listed = [line for line in capsys.readouterr().out.splitlines() if "to be trained" in line]
    assert len(listed) >= len(training.methods)
    assert training.published.keys() <= {*training.methods.values()}


@pytest.mark.integration
def test_a_reproduction_trains_once_and_writes_what_its_table_and_cards_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = next(training for training in sine.TRAININGS if training.name == "sine-5shot-oracle")
    runs, file = tmp_path / "runs", tmp_path / "results.json"

    def run(*arguments: str) -> tuple[Sequence[dict[str, object]], str]:
        monkeypatch.setattr(sys, "argv", ["", f"--runs={runs}", f"--results={file}", *arguments])
        reproduce("", [oracle], (0, 1), "sine.json")
        return json.loads(file.read_text()), capsys.readouterr().out

    (row,), printed = run("--tiny")
    assert row["task"] == "sine, 5 shots" and row["method"] == "oracle" and row["seeds"] == [0, 1, 2]
    assert row["meta_steps"] == 20 and row["test_tasks"] == 20
    assert table([row], (0, 1)) in printed
    trained = [file.stat().st_mtime for file in sorted(runs.rglob("last.ckpt"))]
    assert len(trained) == 3
    assert run("--tiny")[0] == [row] == results_of(oracle, runs) == run("--read")[0]
    assert [file.stat().st_mtime for file in sorted(runs.rglob("last.ckpt"))] == trained

    elsewhere = next(training for training in sine.TRAININGS if training.name == "sine-10shot-oracle")
    other = {**row, "training": elsewhere.name, "task": elsewhere.task}
    file.write_text(json.dumps([other, {**row, "seeds": []}, {**row, "training": "earlier"}]))
    assert merged_results([oracle, elsewhere, sine.TRAININGS[0]], runs, file) == [row, other]

    (card,) = release([oracle], runs, tmp_path / "release")
    monkeypatch.chdir(card.parent)
    code = card.read_text().partition("```python\n")[2].partition("```")[0]
    loaded: dict[str, Any] = {}
    exec(code, loaded)
    assert loaded["network"](torch.zeros(4, 3)).shape == (4, 1)
