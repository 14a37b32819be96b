"""The comparison table fits any terminal width, in readable units."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from maml_pipeline.gradient_order import DEFAULT_ORDERS
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.printed_table import print_table
from maml_pipeline.report.table import seeds_text, table_columns, with_unit
from tests.helpers import make_run

PROBES = [{"step": 49, "order_gap/cosine": 0.983}]

FIRST, SECOND, _ = DEFAULT_ORDERS


def rows(seeds: Sequence[int] = (0, 1), measure: str = "accuracy") -> list[ComparisonRow]:
    runs = [
        make_run(
            order,
            k,
            seed,
            result=0.5 + 0.01 * seed,
            peak_bytes=1.52e6 * k,
            measure=measure,
            history=PROBES,
        )
        for k in (1, 10)
        for order in DEFAULT_ORDERS
        for seed in seeds
    ]
    return next(iter(compare(runs).values()))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        *((0, "B", "0 B"), (5, "B", "5 B"), (272, "B", "272 B"), (480, "FLOP", "480 FLOP")),
        *((1280, "FLOP", "1.28 kFLOP"), (1.52e6, "B", "1.52 MB"), (74_117_772, "B", "74.1 MB")),
        *((999_700, "B", "1 MB"), (5.7734e10, "FLOP", "57.7 GFLOP"), (0.0175, "s", "17.5 ms")),
        *((1.234, "s", "1.23 s"), (2e-6, "s", "2.00 µs"), (float("inf"), "B", "inf")),
    ],
)
def test_costs_have_three_digits_and_a_prefix(value: float, unit: str, text: str) -> None:
    assert with_unit(value, unit) == text


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_terminal_shows_every_value_in_full(
    columns: int,
    seeds: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = rows(seeds)
    print_table("sine", shown)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    assert "…" not in printed
    values = {cell for column in table_columns(shown)[3:] for cell in column.cells} - {"-"}
    for value in values:
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?![\d])", printed), value
    for run in (run for row in shown for run in row.runs):
        assert f"  {run.folder}\n" in printed


def test_a_long_measure_is_wrapped_and_not_truncated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    measure = "mean_absolute_error_of_the_predicted_amplitude_in_metres"
    print_table("sine", rows(measure=measure))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "0.5050 ± 0.0100" in printed and "…" not in printed


def test_a_cell_of_the_page_holds_one_number() -> None:
    numbers = [column for column in table_columns(rows()) if column.group not in ("order", "seeds")]
    for cell in (cell for column in numbers for cell in column.cells):
        assert cell == "-" or len(re.findall(r"\d+(?:\.\d+)?", cell)) == 1


def test_the_order_has_the_same_three_names_everywhere() -> None:
    order, *_ = table_columns(rows())
    assert order.cells == 2 * ["first", "second", "second, checkpointed"]


def test_columns_without_a_value_are_left_out() -> None:
    headings = [column.heading for column in table_columns(rows())]
    assert "test accuracy, lowest result" in headings and "cosine of the orders" in headings
    alone = compare([make_run(SECOND, 1)])["sine"]
    headings = [column.heading for column in table_columns(alone)]
    assert not any("seed," in h or "ratio" in h or "gap" in h or "FLOPs" in h for h in headings)


def test_an_unfinished_seed_has_a_star_and_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    tested = make_run(FIRST, 1, 0)
    killed = replace(make_run(FIRST, 1, 1), test={})
    (row,) = compare([tested, killed])["sine"]
    assert seeds_text(row) == "0, 1*"
    print_table("sine", [row])
    assert "* not finished" in capsys.readouterr().out


def test_a_validation_result_is_marked_beside_a_test_result(capsys: pytest.CaptureFixture[str]) -> None:
    tested = make_run(FIRST, 1)
    history = [{"step": 49, "val/loss": 0.25}]
    untested = replace(make_run(SECOND, 1, history=history), test={})
    shown = compare([tested, untested])["sine"]
    means = next(column for column in table_columns(shown) if column.name == "mean")
    assert means.heading == "test loss, mean" and means.cells == ["0.5000", "0.2500 (validation)"]
    print_table("sine", shown)
    assert "(validation)" in capsys.readouterr().out


def test_a_diverged_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = compare([make_run(FIRST, 1, result=float("nan"), ci95=float("nan"))])["sine"]
    print_table("sine", [row])
    assert "nan" in capsys.readouterr().out
    means = next(column for column in table_columns([row]) if column.name == "mean")
    assert means.cells == ["nan"]
