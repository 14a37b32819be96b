"""Each order is shown with the varied setting that validated best; test results never decide."""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from maml_pipeline.gradient_order import DEFAULT_ORDERS, GradientOrder
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.findings import choice_notes, findings
from maml_pipeline.report.page import write_report
from maml_pipeline.report.plots import draw_plots
from maml_pipeline.report.printed_table import print_table
from maml_pipeline.report.tradeoff_plot import draw_overview
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Run
from maml_pipeline.runs.summary import summarize
from tests.helpers import make_run

FIRST, SECOND, CHECKPOINTED = DEFAULT_ORDERS
LR = "model.inner_lr"
RATES = (0.05, 0.1, 0.4)


def run(
    order: GradientOrder,
    rate: float,
    validation: float | None,
    seed: int = 0,
    *,
    k: int = 1,
    measure: str = "loss",
    result: float = 0.5,
    finished: bool = True,
    peak_bytes: float = 1e6,
) -> Run:
    history = [] if validation is None else [{"step": 9, f"val/{measure}": validation}]
    made = make_run(
        order,
        k,
        seed,
        result=result,
        measure=measure,
        history=history,
        varied={LR: rate},
        peak_bytes=peak_bytes,
    )
    return made if finished else replace(made, test={})


def grid(numbers: random.Random, measure: str) -> list[Run]:
    """Return a whole grid with random validation and test results."""
    runs = []
    for order, k, seed, rate in product(DEFAULT_ORDERS, (1, 5), (0, 1, 2), RATES):
        history = [{"step": 10 * n, f"val/{measure}": numbers.random()} for n in range(4)]
        made = make_run(
            order,
            k,
            seed,
            result=numbers.random(),
            measure=measure,
            history=history,
            varied={LR: rate},
        )
        runs.append(made)
    return runs


def rows_of(runs: Sequence[Run]) -> list[ComparisonRow]:
    (rows,) = compare(runs).values()
    return rows


def chosen(rows: Sequence[ComparisonRow]) -> dict[tuple[GradientOrder, int], float]:
    """Return the chosen learning rate by order and inner steps."""
    return {(row.order, row.inner_steps): row.setting[LR] for row in rows if row.chosen}


def chosen_by_hand(runs: Sequence[Run], measure: str) -> dict[tuple[GradientOrder, int], float]:
    """Choose as a reader with the logs and a pencil would."""
    pick, best = (min, min) if measure == "loss" else (max, max)
    found = {}
    for order, k in product(DEFAULT_ORDERS, (1, 5)):
        means = {}
        for rate in RATES:
            own = [
                r for r in runs
                if (r.order, r.inner_steps, r.config["model"]["inner_lr"]) == (order, k, rate)
            ]  # fmt: skip
            results = [
                best(row[f"val/{measure}"] for row in r.history if f"val/{measure}" in row) for r in own
            ]
            means[rate] = math.fsum(results) / len(results)
        found[order, k] = pick(means, key=lambda rate: means[rate])
    return found


# The choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["loss", "accuracy"])
@pytest.mark.parametrize("number", range(10))
def test_the_choice_is_the_one_by_hand(number: int, measure: str) -> None:
    runs = grid(random.Random(number), measure)
    rows = rows_of(runs)
    assert chosen(rows) == chosen_by_hand(runs, measure)
    assert len(rows) == len(DEFAULT_ORDERS) * 2 * len(RATES)
    # The chosen setting comes first, then the others by their value.
    for first, *others in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        assert first.chosen and not any(row.chosen for row in others)
        assert [row.setting[LR] for row in others] == sorted({*RATES} - {first.setting[LR]})


@pytest.mark.parametrize("number", range(10))
def test_permuting_test_results_never_changes_the_choice(number: int) -> None:
    numbers = random.Random(number)
    runs = grid(numbers, "loss")
    before = chosen(rows_of(runs))
    for _ in range(5):
        tests = [r.test for r in runs]
        numbers.shuffle(tests)
        permuted = [replace(r, test=test) for r, test in zip(runs, tests, strict=True)]
        assert chosen(rows_of(permuted)) == before
        numbers.shuffle(permuted)  # nor does the order in which runs are found
        assert chosen(rows_of(permuted)) == before


def test_a_summary_chooses_as_the_runs_do(tmp_path: Path) -> None:
    runs = grid(random.Random(0), "loss")
    file = tmp_path / "tradeoff.json"
    file.write_text(json.dumps({"cells": [summarize(r) for r in runs]}))
    assert chosen(rows_of(find_runs([file]).runs)) == chosen(rows_of(runs))


def test_every_ratio_is_to_first_order_with_its_own_best_setting() -> None:
    costs = {(FIRST, 0.05): 1e6, (FIRST, 0.1): 2e6, (SECOND, 0.05): 4e6, (SECOND, 0.1): 8e6}
    losses = {(FIRST, 0.05): 0.2, (FIRST, 0.1): 0.1, (SECOND, 0.05): 0.1, (SECOND, 0.1): 0.2}
    rows = rows_of([run(*of, losses[of], peak_bytes=cost) for of, cost in costs.items()])
    ratios = {(row.order, row.setting[LR]): row.ratio("peak_bytes") for row in rows}
    assert ratios == {(FIRST, 0.1): None, (FIRST, 0.05): 0.5, (SECOND, 0.05): 2, (SECOND, 0.1): 4}
    (sentence,) = findings(rows)
    assert "second order (inner_lr 0.05) reached" in sentence
    assert "and first order (inner_lr 0.1)" in sentence and "2.00 times the peak memory" in sentence


def test_json_tells_what_was_varied_and_chosen() -> None:
    rows = rows_of([run(FIRST, 0.1, 0.25, s) for s in (0, 1)] + [run(FIRST, 0.4, 0.5, 0)])
    best, other = (row.to_json() for row in rows)
    assert (best["varied"], best["chosen"], best["validation"]) == ({LR: 0.1}, True, 0.25)
    assert (other["varied"], other["chosen"], other["validation"]) == ({LR: 0.4}, False, 0.5)
    assert best["validation_seeds"] == other["validation_seeds"] == [0]
    (alone,) = rows_of([make_run(FIRST, 1)])
    assert (alone.to_json()["varied"], alone.to_json()["chosen"]) == ({}, None)


# What limits the choice -------------------------------------------------------------------------


def test_tied_settings_are_named_and_the_first_is_shown() -> None:
    rows = rows_of([run(FIRST, rate, 0.5) for rate in (0.4, 0.1)])
    assert chosen(rows) == {(FIRST, 1): 0.1}
    _, note = choice_notes(rows)
    assert note == (
        "First order, 1 inner step: inner_lr 0.1 and 0.4 validated equally well, and the first is shown."
    )


def test_an_unfinished_setting_is_not_chosen_and_is_named() -> None:
    rows = rows_of([run(FIRST, 0.1, 0.5), run(FIRST, 0.4, 0.001, finished=False)])
    assert chosen(rows) == {(FIRST, 1): 0.1}
    assert choice_notes(rows)[1].endswith(": compared without inner_lr 0.4 (not finished).")


def test_a_setting_that_one_order_was_not_trained_with_is_named() -> None:
    rows = rows_of([run(FIRST, 0.1, 0.5), run(FIRST, 0.4, 0.4), run(SECOND, 0.1, 0.5)])
    assert chosen(rows) == {(FIRST, 1): 0.4, (SECOND, 1): 0.1}
    _, note = choice_notes(rows)
    assert note == "Second order, 1 inner step: compared without inner_lr 0.4 (not finished)."


def test_a_single_value_is_not_called_a_choice() -> None:
    (note,) = choice_notes(rows_of([run(FIRST, 0.1, 0.5), run(SECOND, 0.1, 0.4)]))
    assert note == (
        "Varied: inner_lr. All runs found have inner_lr 0.1, so there was nothing to choose from."
    )


def test_a_run_that_stopped_at_a_loss_that_is_not_finite_is_not_waited_for(tmp_path: Path) -> None:
    stopped = replace(run(FIRST, 0.4, 0.1), source=tmp_path, test={})
    (tmp_path / "config.yaml").touch()
    log, start = tmp_path / "log.txt", "\nRun folder: runs/x\n"
    log.write_text(f"{start}maml: error: the loss is inf at meta-step 9, inner step 1\n{start}")
    rows = rows_of([run(FIRST, 0.1, 5.0), stopped])
    assert rows[0].choice is not None
    assert [*rows[0].choice.unfinished] == [stopped.varied], "it may have been resumed"
    log.write_text(f"{start}maml: error: the loss is inf at meta-step 9, inner step 1\n")
    rows = rows_of([run(FIRST, 0.1, 5.0), stopped])
    assert rows[0].choice is not None and not rows[0].choice.unfinished
    assert chosen(rows) == {(FIRST, 1): 0.1}
    assert choice_notes(rows)[1].endswith(": inner_lr 0.4 diverged.")


def test_a_summary_tells_which_runs_have_diverged(tmp_path: Path) -> None:
    # With the other seed, the rate that diverged validated best.
    runs = [run(FIRST, 0.1, 0.5, 0), run(FIRST, 0.1, 0.5, 1), run(FIRST, 0.4, 0.1, 0)]
    runs.append(replace(run(FIRST, 0.4, 0.1, 1), source=tmp_path, test={}))
    (tmp_path / "config.yaml").touch()
    log = "\nRun folder: runs/x\nmaml: error: the loss is nan at meta-step 9, inner step 1\n"
    (tmp_path / "log.txt").write_text(log)
    file = tmp_path / "tradeoff.json"
    file.write_text(json.dumps({"cells": [summarize(one) for one in runs]}))
    read = rows_of(find_runs([file]).runs)
    assert chosen(read) == chosen(rows_of(runs)) == {(FIRST, 1): 0.1}
    assert choice_notes(read) == choice_notes(rows_of(runs))


def test_settings_are_compared_on_the_seeds_that_all_have() -> None:
    # Seed 1 is hard: its result would lower the mean of the setting that has it.
    runs = [run(FIRST, 0.1, 0.3, 0), run(FIRST, 0.1, 0.9, 1), run(FIRST, 0.4, 0.4, 0)]
    rows = rows_of(runs)
    assert chosen(rows) == {(FIRST, 1): 0.1}
    _, note = choice_notes(rows)
    assert "compared without seed 1 (not finished with inner_lr 0.4)" in note
    disjoint = rows_of([runs[1], runs[2]])
    assert not chosen(disjoint) and not any(row.is_outdone for row in disjoint)
    assert "no seed is finished with each setting" in choice_notes(disjoint)[1]


def test_a_diverged_setting_is_not_chosen_and_is_named() -> None:
    rows = rows_of([run(FIRST, 0.1, 5.0), run(FIRST, 0.4, math.nan)])
    assert chosen(rows) == {(FIRST, 1): 0.1}
    assert choice_notes(rows)[1].endswith(": inner_lr 0.4 diverged.")
    rows = rows_of([run(FIRST, rate, math.nan) for rate in RATES])
    assert not chosen(rows) and not any(row.is_outdone for row in rows)
    assert "nothing could be chosen, so all settings are shown" in choice_notes(rows)[1]


def test_a_run_that_diverges_after_its_best_validation_counts_with_that() -> None:
    late = run(FIRST, 0.4, 0.1)
    late = replace(late, history=[*late.history, {"step": 19, "val/loss": math.nan}])
    assert chosen(rows_of([run(FIRST, 0.1, 0.5), late])) == {(FIRST, 1): 0.4}


def test_without_any_validation_all_settings_are_shown_equally() -> None:
    rows = rows_of([run(order, rate, None) for order in (FIRST, SECOND) for rate in RATES])
    assert not chosen(rows) and not any(row.is_outdone for row in rows)
    assert all(row.to_json()["chosen"] is None for row in rows)
    notes = choice_notes(rows)
    assert "nothing could be chosen, so all settings are shown" in notes[1]
    assert "without inner_lr 0.05, 0.1 and 0.4 (never validated)" in notes[1]
    # Each is then compared with first order at the same setting.
    for row in rows[3:]:
        assert row.first_order_row is not None and row.first_order_row.setting == row.setting


def test_a_best_value_at_an_end_of_those_tried_is_named() -> None:
    rows = rows_of([run(FIRST, rate, rate) for rate in RATES])
    assert "inner_lr 0.05 is the smallest value tried: a better one may lie" in choice_notes(rows)[1]
    rows = rows_of([run(FIRST, rate, abs(rate - 0.1)) for rate in RATES])
    assert len(choice_notes(rows)) == 1


def test_equal_remarks_are_one_sentence() -> None:
    end = "inner_lr 0.05 is the smallest value tried: a better one may lie beyond it."
    runs = [run(order, rate, rate, k=k) for order in DEFAULT_ORDERS for k in (1, 5) for rate in RATES]
    assert choice_notes(rows_of(runs))[1:] == [f"Every order and number of inner steps: {end}"]
    runs = [
        run(order, rate, abs(rate - (0.1 if (order, k) == (SECOND, 1) else 0.05)), k=k)
        for order, k, rate in product((FIRST, SECOND), (1, 5), RATES)
    ]
    (note,) = choice_notes(rows_of(runs))[1:]
    assert note == f"First order, 1 and 5 inner steps; second order, 5 inner steps: {end}"


# Which runs are chosen among --------------------------------------------------------------------


def test_runs_that_declare_nothing_are_separate_groups() -> None:
    def undeclared(one: Run) -> Run:
        return replace(one, config=one.config | {"run": one.config["run"] | {"varied": None}})

    runs = [run(FIRST, rate, 0.5) for rate in RATES]
    plain = [undeclared(one) for one in runs]
    assert [*compare(plain)] == [f"sine, model.inner_lr {rate}" for rate in RATES]
    mixed = compare([*runs, *plain])
    assert len(mixed) == 4 and "sine, model.inner_lr varied" in mixed
    assert len(mixed["sine, model.inner_lr varied"]) == 3


def test_runs_that_differ_in_an_undeclared_key_are_separate_groups() -> None:
    def with_batch(one: Run, size: int) -> Run:
        return replace(one, config=one.config | {"data": {"meta_batch_size": size}})

    runs = [with_batch(run(FIRST, rate, 0.5), size) for rate in RATES for size in (4, 8)]
    groups = compare(runs)
    assert [*groups] == ["sine, data.meta_batch_size 4", "sine, data.meta_batch_size 8"]
    assert all(len(rows) == 3 for rows in groups.values())


@pytest.mark.parametrize(
    ("key", "value", "is_other"),
    [
        ("gradient_clip_val", 10.0, True),
        ("accumulate_grad_batches", 8, True),
        ("limit_test_batches", 0.5, True),
        ("precision", "64-true", True),
        ("max_steps", 200, True),
        ("devices", 2, False),
        ("log_every_n_steps", 5, False),
    ],
)
def test_only_runs_that_were_trained_alike_are_seeds_of_one_row(
    key: str, value: object, is_other: bool
) -> None:
    one, two = make_run(FIRST, 1, 0), make_run(FIRST, 1, 1)
    other = replace(two, config=two.config | {"trainer": two.config["trainer"] | {key: value}})
    titles = [*compare([one, other])]
    assert len(titles) == (2 if is_other else 1)
    assert not is_other or titles[1] == f"sine, trainer.{key} {value}"


def test_as_many_steps_as_in_training_are_a_number_of_steps_at_test() -> None:
    def tested_as_trained(one: Run) -> Run:
        return replace(
            one, config=one.config | {"model": one.config["model"] | {"eval_inner_steps": None}}
        )

    runs = [tested_as_trained(make_run(FIRST, k)) for k in (1, 5)]
    assert [*compare(runs)] == [f"sine, model.eval_inner_steps {k}" for k in (1, 5)]


@pytest.mark.parametrize(
    "setting",
    [
        {"model.inner_lr": 0.1, "model.optimizer.init_args.lr": 0.1},
        {"trainer.gradient_clip_val": None},
        {"model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}},
        {"model.network.init_args.hidden_features": [64, 64]},
        {"a.lr": 1, "b.lr": 1.0},
    ],
)
def test_any_setting_is_shown(setting: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    other = dict.fromkeys(setting, 7)
    history = [{"step": 9, "val/loss": 0.5}]
    rows = rows_of([make_run(FIRST, 1, varied=one, history=history) for one in (setting, other)])
    assert len(rows) == 2 and len({row.runs[0].name for row in rows}) == 2
    print_table("sine", rows)
    for key in setting:
        assert key.rpartition(".")[2] in capsys.readouterr().out or len(setting) > 1
    assert draw_plots(rows)


# Shown ------------------------------------------------------------------------------------------


def test_the_terminal_shows_chosen_rows_and_below_them_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = rows_of(grid(random.Random(1), "accuracy"))
    print_table("sine", rows)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    assert not re.search(r"[0-9] +$", printed, re.MULTILINE)
    main, _, every = printed.partition("Chosen by validation:")
    for row in rows:
        assert row.result is not None and row.validation is not None
        mean, validation = f"{row.result.mean:.4f} ±", f"{row.validation:.4f}"
        assert mean in every and validation in every
        assert (mean in main) == (row.chosen is True)
    assert every.count(" yes") == 6 and every.count(" no\n") == 12
    assert "highest val/accuracy of the best" in every.replace("\n", " ")


def test_values_of_varied_keys_have_columns_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ({LR: 0.1, "data.meta_batch_size": 4}, {LR: 0.1, "data.meta_batch_size": 8})
    history = [{"step": 9, "val/loss": 0.5}]
    rows = rows_of([make_run(FIRST, 1, varied=one, history=history) for one in settings])
    for width, is_column in ((60, False), (120, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table("sine", rows)
        main = capsys.readouterr().out.partition("Chosen by validation:")[0]
        assert ("inner_lr 0.1" in main) is not is_column
        assert "inner_lr" in main and max(map(len, main.splitlines())) <= width


def test_memories_that_are_equal_up_to_rounding_are_drawn() -> None:
    for peak in (272.0, 1099.0):
        peaks = {FIRST: peak, SECOND: math.nextafter(peak, math.inf)}
        assert draw_plots(rows_of([run(m, 0.1, 0.5, peak_bytes=p) for m, p in peaks.items()]))


def test_plots_join_the_chosen_rows_and_show_the_others_faintly() -> None:
    rows = rows_of(grid(random.Random(1), "loss"))
    plots = {plot.name: plot for plot in draw_plots(rows)}
    (ax,) = plots["tradeoff"].figure.axes
    faint = [line for line in ax.lines if line.get_markersize() == 3 and line.get_alpha() == 0.4]
    assert len(faint) == sum(row.is_outdone for row in rows) == 12
    best = chosen(rows)
    labels = {text.get_text() for text in ax.texts}
    assert labels == {f"k={k} ({rate})" for (_, k), rate in best.items()}
    assert "in brackets: inner_lr" in plots["tradeoff"].caption.lower()
    assert all("not chosen by validation" in plot.caption for plot in plots.values())
    assert draw_overview({"sine": rows})


def test_where_nothing_is_chosen_a_line_for_each_setting_has_one_label() -> None:
    grid = product(DEFAULT_ORDERS, (1, 3, 5), RATES)
    rows = rows_of([run(order, rate, None, k=k) for order, k, rate in grid])
    (plot,) = [plot for plot in draw_plots(rows) if plot.name == "tradeoff"]
    (ax,) = plot.figure.axes
    labels = [text.get_text() for text in ax.texts]
    assert sorted(labels) == sorted(f"k=5 ({rate})" for rate in RATES for _ in DEFAULT_ORDERS)


def test_the_page_greys_the_others_and_says_how_the_choice_was_made(tmp_path: Path) -> None:
    rows = rows_of(grid(random.Random(1), "loss"))
    page = write_report({"sine": rows}, tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    assert page.count('class="outdone"') == 12
    for note in choice_notes(rows):
        assert note in page
    assert "Test results play no part in the choice" in markdown
    assert "| chosen |" in markdown and markdown.count("| yes |") == 6


def test_a_report_without_varied_keys_has_no_sign_of_a_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of([make_run(order, 1) for order in DEFAULT_ORDERS])
    page = write_report({"sine": rows}, tmp_path).read_text()
    print_table("sine", rows)
    table = page[: page.index("What the columns mean")]
    for text in (table, capsys.readouterr().out):
        assert "chosen" not in text and "Varied" not in text
    assert 'class="outdone"' not in page
