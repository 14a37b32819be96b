"""A run reads the same from its folder, its W&B log or a summary, and runs compare seed by seed."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.metrics_table import MetricsRow
from maml_pipeline.report.comparison import QUANTITIES, ComparisonRow, compare
from maml_pipeline.report.findings import findings
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.read import read_wandb_run
from maml_pipeline.runs.run import Run
from maml_pipeline.runs.summary import summarize
from maml_pipeline.tradeoff.cells import meta_steps_done
from tests.helpers import make_run
from tests.run_copies import copy_run, each, edit, remove


def essence(run: Run) -> dict[str, object]:
    """Return everything that a report shows of a run."""
    return {
        **{name: getattr(run, name) for name in (*QUANTITIES, "name", "experiment", "test_curve")},
        "result": run.result,
        "curve": run.series(run.monitor),
        "gap": run.series("order_gap/cosine"),
        "training": run.series("train/loss"),
        "is_finished": run.is_finished,
        "meta_steps": run.meta_steps,
    }


@pytest.mark.integration
def test_runs_are_sorted_by_experiment_inner_steps_order_and_seed(trained_runs: Path) -> None:
    orders = ("first", "second", "checkpointed")
    grid = [("toy", f"{o}-k{k}-s{s}") for k in (1, 2) for o in orders for s in (0, 1)]
    found = [(run.experiment, run.name) for run in find_runs([trained_runs]).runs]
    assert found == [("other", "second-k1-s0"), *grid]


@pytest.mark.integration
def test_a_path_given_twice_is_one_run(trained_runs: Path) -> None:
    folder = trained_runs / "other"
    assert len(find_runs([folder, folder / "alone", folder]).runs) == 1


@pytest.mark.integration
def test_a_run_read_from_its_wandb_log_equals_the_one_read_from_its_folder(
    trained_runs: Path, tmp_path: Path
) -> None:
    folder = trained_runs / "lines" / "second-k2-s1"
    shutil.copytree(folder / "wandb", tmp_path / "wandb")
    (ours,), (theirs,) = find_runs([folder]).runs, find_runs([tmp_path]).runs
    assert {key: theirs.config[key] for key in ours.config} == ours.config
    assert essence(theirs) == essence(ours)


@pytest.mark.integration
def test_runs_read_from_a_summary_equal_those_read_from_their_folders(
    trained_runs: Path, tmp_path: Path
) -> None:
    runs = find_runs([trained_runs / "lines"]).runs
    file = tmp_path / "tradeoff.json"
    file.write_text(json.dumps({"cells": [summarize(run) for run in runs]}))
    for theirs, ours in zip(find_runs([file]).runs, runs, strict=True):
        assert essence(theirs) == essence(ours)


@pytest.mark.integration
def test_the_result_of_an_unfinished_run_is_its_latest_validation(
    trained_runs: Path, tmp_path: Path
) -> None:
    def cut(table: str) -> str:
        lines = table.splitlines(keepends=True)
        return "".join(lines[:-1]) + lines[-1][:9]

    # The last row is only partly written.
    unfinished = each(remove("test.json"), edit("metrics.csv", cut))
    folder = copy_run(trained_runs / "other" / "alone", tmp_path / "unfinished", unfinished)
    (run,) = find_runs([folder]).runs
    assert not run.is_finished and run.result is not None and run.result.split == "val"
    assert run.result.mean == run.series("val/loss")[-1][1]
    assert run.meta_steps == 30


@pytest.mark.integration
def test_the_wandb_log_of_an_active_run_is_read_up_to_its_last_record(
    trained_runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained_runs / "other" / "alone" / "wandb", tmp_path / "wandb")
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    whole = log.read_bytes()
    (before,) = find_runs([tmp_path]).runs
    log.write_bytes(whole[: whole.index(b"test/loss")])
    (run,) = find_runs([tmp_path]).runs
    assert not run.is_finished and run.series("val/loss") == before.series("val/loss")


def test_the_test_of_a_run_that_was_then_extended_is_not_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(GradientOrder.parse("second"), 1).config
    logged = {
        "first": [{"step": 9.0, "val/loss": 0.5}, {"step": 10.0, "test/loss": 0.4}],
        "second": [{"step": 19.0, "val/loss": 0.3}],
        "third": [{"step": 20.0, "test/loss": 0.2}],
    }

    def read(log: Path) -> tuple[dict[str, Any], list[MetricsRow]]:
        return config, logged[log.name]

    monkeypatch.setattr("maml_pipeline.learner.tracking.read_wandb_log", read)
    extended = read_wandb_run([tmp_path / "first", tmp_path / "second"])
    assert not extended.is_finished and extended.meta_steps == 20
    assert extended.result is not None and extended.result.mean == 0.3
    assert read_wandb_run([tmp_path / "first"]).test == {"test/loss": 0.4}
    assert read_wandb_run([tmp_path / name for name in logged]).test == {"test/loss": 0.2}


def test_a_small_result_is_not_called_zero() -> None:
    runs = [
        make_run(GradientOrder.parse(o), 1, result=r) for o, r in (("first", 3e-5), ("second", 1e-5))
    ]
    (sentence,) = findings(compare(runs)["sine"])
    assert "test loss of 1.00e-05 and first order 3.00e-05" in sentence


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        find_runs([tmp_path])
    assert str(tmp_path) in str(error.value)
    assert "it holds no run: a run has config.yaml and metrics.csv" in str(error.value)


def test_a_path_that_does_not_exist_is_named(maml_error: Callable[..., str]) -> None:
    assert "nowhere: it does not exist" in maml_error("report", "nowhere")
    assert "RUN_DIR" in maml_error("report")


# The comparison ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(trained_runs: Path) -> list[ComparisonRow]:
    return compare(find_runs([trained_runs / "lines"]).runs)["toy"]


def test_runs_that_differ_by_their_seed_are_one_row(rows: list[ComparisonRow]) -> None:
    assert [(str(row.order), row.inner_steps, len(row.runs)) for row in rows] == [
        (order, k, 2) for k in (1, 2) for order in ("first", "second", "checkpointed")
    ]
    for row in rows:
        results = [run.test["test/loss"] for run in row.runs]
        assert row.result is not None and row.result_range == (min(results), max(results))
        assert row.result.mean == pytest.approx(sum(results) / 2)


@pytest.mark.integration
def test_a_comparison_does_not_depend_on_the_order_of_runs(trained_runs: Path) -> None:
    runs = find_runs([trained_runs / "lines"]).runs

    def compared(runs: list[Run]) -> list[tuple[object, ...]]:
        return [
            (str(row.order), row.inner_steps, {run.seed for run in row.runs}, row.ratio("flops"))
            for row in compare(runs)["toy"]
        ]

    assert compared(runs[::-1]) == compared([*runs[::2], *runs[1::2]]) == compared(runs)


def test_ratios_are_to_first_order_with_the_same_inner_steps(rows: list[ComparisonRow]) -> None:
    for row in rows:
        first = next(r for r in rows if (str(r.order), r.inner_steps) == ("first", row.inner_steps))
        for cost in ("peak_bytes", "flops", "meta_step_ms"):
            own, other = row.mean(cost), first.mean(cost)
            assert own is not None and other is not None
            assert row.ratio(cost) == (None if row is first else pytest.approx(own / other))
    second = rows[1]
    assert (second.ratio("peak_bytes") or 0) > 1 and (second.ratio("flops") or 0) > 1


def test_findings_name_result_memory_and_time(rows: list[ComparisonRow]) -> None:
    sentences = findings(rows)
    assert len(sentences) == 4  # of each row that is not first order
    assert all("times the peak memory and" in text and "times the time" in text for text in sentences)
    second = rows[1].result
    assert second is not None and f"{second.mean:.4f}" in sentences[0]


@pytest.mark.integration
def test_runs_with_other_settings_are_separate_groups(trained_runs: Path) -> None:
    runs = find_runs([trained_runs / "lines"]).runs
    model = runs[0].config["model"]
    faster = [
        replace(run, config=run.config | {"model": run.config["model"] | {"inner_lr": 0.2}})
        for run in runs
    ]
    other = [
        replace(run, config=run.config | {"run": run.config["run"] | {"mode": "max"}}) for run in runs
    ]
    assert [*compare(runs[:1] + other[1:])] == ["toy, run.mode min", "toy, run.mode max"]
    groups = compare(sorted(runs + faster, key=lambda run: (run.inner_steps, run.order.rank)))
    assert [*groups] == [f"toy, model.inner_lr {lr}" for lr in (model["inner_lr"], 0.2)]
    assert all(len(row.runs) == 2 for rows in groups.values() for row in rows)
    # Data paths and the number of workers do not matter.
    moved = [
        replace(run, config=run.config | {"data": run.config["data"] | {"num_workers": 3}})
        for run in runs
    ]
    assert [*compare(moved[:1] + runs[1:])] == ["toy"]


@pytest.mark.integration
def test_a_comparison_without_first_order_has_no_ratios(trained_runs: Path) -> None:
    (row,) = compare(find_runs([trained_runs / "other"]).runs)["other"]
    assert row.first_order_row is None and row.ratio("peak_bytes") is None
    assert row.to_json()["peak_bytes_to_first_order"] is None
    assert not findings([row])


def test_tradeoff_json_never_contains_nan(rows: list[ComparisonRow]) -> None:
    run = rows[0].runs[0]
    lost = replace(run, test=dict.fromkeys(run.test, math.nan))
    diverged = ComparisonRow([lost, replace(lost, test=dict.fromkeys(run.test, math.inf))], None)
    assert json.dumps(summarize(lost), allow_nan=False)
    for row in [*rows, diverged]:
        text = json.dumps(row.to_json(), allow_nan=False)
        assert json.loads(text)["order"] == str(row.order)


def test_meta_steps_are_counted_while_metrics_csv_grows(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    assert meta_steps_done(tmp_path) == 0
    for text, steps in (("", 0), ("step,a\n", 0), ("step,a\n4,1\n", 5), ("step,a\n4,1\n17", 5)):
        table.write_text(text)
        assert meta_steps_done(tmp_path) == steps
    table.write_text("step,a\n" + "".join(f"{step},1.5\n" for step in range(50_000)))
    assert meta_steps_done(tmp_path) == 50_000
