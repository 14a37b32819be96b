"""`maml tradeoff --best_of` trains each order with the values that validated best elsewhere."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.comparison import ComparisonRow, compare, lines
from maml_pipeline.report.findings import choice_notes, findings
from maml_pipeline.report.plots import draw_plots
from maml_pipeline.runs.find import find_runs
from tests.helpers import CONFIGS, Maml, make_run, process_environment, read_config
from tests.written_runs import write_search

TOY = ("tradeoff", "--config", CONFIGS / "toy.yaml", "--best_of", "search")
LR = "model.inner_lr"
SECOND = GradientOrder.parse("second")
VALIDATIONS = {
    "first": {0.05: 0.5, 0.1: 0.7, 0.2: 0.6},
    "truncated-2": {0.05: 0.9, 0.1: 0.3, 0.2: 0.4},
    "second": {0.05: 0.9, 0.1: 0.8, 0.2: 0.1},
}
BEST = {"first": 0.05, "truncated-2": 0.1, "second": 0.2}


def listed(printed: str) -> list[str]:
    """Return the names of the cells that a dry run lists."""
    return re.findall(r"^\S*?([^/\s]+): to be trained$", printed, re.MULTILINE)


def test_every_order_gets_its_own_best_value(maml: Maml, tmp_path: Path) -> None:
    write_search(tmp_path / "search", VALIDATIONS, 3)
    printed = maml(*TOY, "--seeds", "0,1", "--dry_run")
    assert listed(printed) == [
        f"{order}-k3-inner_lr={rate}-s{seed}" for seed in (0, 1) for order, rate in BEST.items()
    ]
    names = "first, k = 3: inner_lr 0.05; truncated 2, k = 3: inner_lr 0.1; second, k = 3: inner_lr 0.2"
    assert f"Best by validation in search: {names}\n" in printed
    assert "inner_lr 0.05 is the smallest value tried: a better one may lie beyond it" in printed
    some = maml(*TOY, "--orders", "second,first", "--inner_steps", "3", "--dry_run")
    assert listed(some) == ["second-k3-inner_lr=0.2-s0", "first-k3-inner_lr=0.05-s0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vary", f"{LR}=0.1"), "--best_of: not allowed with argument --vary"),
        (("--orders", "checkpointed"), "search has no runs of checkpointed with 3 inner steps"),
        (("--inner_steps", "5"), "search has no runs of first with 5 inner steps"),
        (("--run.experiment", "other"), "search is of toy, not of other"),
        (("--best_of", "missing"), "best_of missing: there is no run to show"),
        (("--model.inner_lr", "nan"), "model.inner_lr is nan"),
    ],
)
def test_what_cannot_be_taken_from_a_search_is_refused(
    flags: tuple[str, ...], message: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    write_search(tmp_path / "search", VALIDATIONS, 3)
    assert message in maml_error(*TOY, *flags, "--dry_run")
    assert [path.name for path in tmp_path.iterdir()] == ["search"]


def test_a_search_that_chose_nothing_is_refused(maml_error: Callable[..., str], tmp_path: Path) -> None:
    write_search(tmp_path / "search", {**VALIDATIONS, "second": {0.05: 0.1}}, 3)
    unfinished = maml_error(*TOY, "--dry_run")
    assert "second with 3 inner steps is not finished with inner_lr 0.1; inner_lr 0.2" in unfinished
    (tmp_path / "search").rename(tmp_path / "before")
    write_search(tmp_path / "search", {"first": {0.05: float("nan"), 0.1: float("nan")}}, 3)
    assert "for first with 3 inner steps, validation could choose no value" in maml_error(*TOY)


def test_the_values_of_a_search_may_themselves_be_chosen_elsewhere(maml: Maml, tmp_path: Path) -> None:
    write_search(tmp_path / "search", {order: {rate: 0.5} for order, rate in BEST.items()}, 3)
    printed = maml(*TOY, "--dry_run")
    assert listed(printed) == [f"{order}-k3-inner_lr={rate}-s0" for order, rate in BEST.items()]
    assert "Each order and number of inner steps was trained with a single value." in printed


def test_an_unfinished_run_does_not_choose_its_value(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    write_search(tmp_path / "search", {"first": {0.05: 0.5}}, 3)
    assert "inner_lr 0.05, so there was nothing to choose from" in maml(*TOY, "--dry_run")
    summary = tmp_path / "search" / "tradeoff.json"
    content = json.loads(summary.read_text())
    content["cells"][0]["test"] = {}
    summary.write_text(json.dumps(content))
    assert "first with 3 inner steps is not finished with inner_lr 0.05" in maml_error(*TOY)


def test_the_report_of_the_chosen_values_compares_them_without_a_choice() -> None:
    runs = [
        make_run(GradientOrder.parse(order), 3, seed, varied={LR: rate})
        for order, rate in BEST.items()
        for seed in (0, 1)
    ]
    (rows,) = compare(runs).values()
    assert [(str(row.order), row.setting[LR], row.chosen) for row in rows] == [
        (order, rate, None) for order, rate in BEST.items()
    ]
    assert all(row.first_order_row is rows[0] for row in rows[1:])
    (note,) = choice_notes(rows)
    assert (
        note == "Varied: inner_lr. Each order and number of inner steps was trained with a single value."
    )
    assert "truncated to 2 steps (inner_lr 0.1)" in findings(rows)[0]
    several = [make_run(SECOND, k, varied={LR: rate}) for k, rate in ((1, 0.1), (5, 0.4))]
    (line,) = lines(compare(several)["sine"])
    assert [row.inner_steps for row in line] == [1, 5]
    (ax,) = next(plot.figure for plot in draw_plots(rows) if plot.name == "tradeoff").axes
    assert len([line for line in ax.lines if line.get_label() in ("first", "second")]) <= 2
    assert {text.get_text() for text in ax.texts} == {
        f"{order.replace('-', ' ')} ({rate})" for order, rate in BEST.items()
    }


@pytest.mark.integration
def test_a_search_and_its_final_runs_may_share_a_folder(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in process_environment().items():
        if key in ("PYTHONPATH", "OMP_NUM_THREADS"):
            monkeypatch.setenv(key, value)
    grid = (
        *("tradeoff", "--config", CONFIGS / "toy.yaml", "--trainer.max_steps", 4),
        *("--trainer.val_check_interval", 2, "--data.val_tasks", 5, "--data.test_tasks", 5),
        *("--out", tmp_path / "grid"),
    )
    maml(*grid, "--orders", "first", "--vary", f"{LR}=0.05,0.2")
    (chosen,) = [row for row in rows_of(tmp_path / "grid") if row.chosen]
    printed = maml(*grid, "--best_of", tmp_path / "grid", "--seeds", "0,1")
    assert "2 cells, 1 finished" in printed
    best, other = rows_of(tmp_path / "grid")
    assert best.chosen and best.setting == chosen.setting
    assert [[r.seed for r in row.runs] for row in (best, other)] == [[0, 1], [0]]
    folder = tmp_path / "grid" / f"first-k1-inner_lr={chosen.setting[LR]}-s1"
    assert read_config(folder)["run"]["varied"] == [LR]


def rows_of(folder: Path) -> list[ComparisonRow]:
    (rows,) = compare(find_runs([folder]).runs).values()
    return rows
