"""The comparison as tables on the terminal, with up to three lines per row."""

import textwrap
from collections.abc import Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table

from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.findings import choice_notes
from maml_pipeline.report.table import (
    CHOSEN,
    COST_NAMES,
    UNKNOWN,
    cosine_text,
    cost_text,
    measure_heading,
    ratio_text,
    result_text,
    seeds_text,
    setting_cell,
    table_notes,
    validation_text,
    varied_names,
)
from maml_pipeline.text import printable


def print_table(title: str, rows: Sequence[ComparisonRow]) -> None:
    """Print the rows of one experiment as a table, and below it the folders of their runs.

    If keys are varied, the table has the chosen settings only, and a second table has all of them.
    """
    # Names may look like markup: print all text literally.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"\n{title}", soft_wrap=True)
    compared = [row for row in rows if not row.is_outdone]
    table = _comparison(console, compared, with_columns=True)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        table = _comparison(console, compared, with_columns=False)
    _print(console, table)
    for note in table_notes(rows):
        console.print(note)
    if notes := choice_notes(rows):
        if any(row.choice is not None for row in rows):
            _print_choices(console, rows)
        for note in notes:
            console.print(f"\n{note}")
        console.print()
    console.print("Runs:")
    for row in rows:
        for run in row.runs:
            console.print(f"  {run.folder}", soft_wrap=True)


def _print_choices(console: Console, rows: Sequence[ComparisonRow]) -> None:
    """Print the validation and the test result of every setting; those not chosen are dim."""
    names = varied_names(rows)
    measure = printable(rows[0].runs[0].measure)
    headings = (
        *("order", "inner\nsteps", *map(_broken, names.values())),
        *("seeds", f"best validation\n{measure}"),
        *(f"{measure_heading(rows)}\n± 95 % CI", "chosen"),
    )
    cells = []
    for row in rows:
        setting = [setting_cell(row, key) for key in names]
        texts = [row.order.label, str(row.inner_steps), *setting, seeds_text(row)]
        result = result_text(row, rows, with_range=False)
        cells.append([*texts, validation_text(row), result, CHOSEN[row.chosen]])
    console.print("\nChosen by validation:")
    styles = ["dim" if row.is_outdone else "" for row in rows]
    _print(console, _table(console, headings, cells, styles))


def _broken(name: str) -> str:
    """Break a long name after underscores."""
    return textwrap.fill(name.replace("_", "_ "), 14).replace("_ ", "_")


def _comparison(console: Console, rows: Sequence[ComparisonRow], with_columns: bool) -> Table:
    """Return the table of results and costs.

    Args:
        console: Where the table will be printed.
        rows: Its rows.
        with_columns: Whether varied keys have columns; otherwise their values are below the order.
    """
    names = [_broken(name) for name in varied_names(rows).values()] if with_columns else []
    headings = (
        *("order", "inner\nsteps", *names, "seeds"),
        *(f"{measure_heading(rows)}\n± 95 % CI", "peak\nmemory", "time", "FLOPs"),
        "cosine of\norders",
    )
    return _table(console, headings, [_stacked_cells(row, rows, with_columns) for row in rows])


def _print(console: Console, table: Table) -> None:
    """Print a table; in a file or a pipe, its lines have no blanks at the end."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        console.print(line.rstrip(), soft_wrap=True)


def _table(
    console: Console, headings: Sequence[str], rows: Sequence[list[str]], styles: Sequence[str] = ()
) -> Table:
    """Return a table without the columns that have no value."""
    table = Table(box=None, pad_edge=False, padding=(0, 2 if console.width >= 100 else 1, 0, 0))
    known = [number for number, cells in enumerate(zip(*rows, strict=True)) if {*cells} != {UNKNOWN}]
    for number in known:
        justify: JustifyMethod = "left" if number == 0 else "right"
        # No word of an order's name is broken.
        words = [word for cells in rows for word in cells[0].split()] if number == 0 else []
        least = max(map(len, words), default=None)
        table.add_column(headings[number], justify=justify, overflow="fold", min_width=least)
    for cells, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*(cells[number] for number in known), style=style)
    return table


def _stacked_cells(row: ComparisonRow, rows: Sequence[ComparisonRow], with_columns: bool) -> list[str]:
    """Return the cells of a row on the terminal, each in up to three lines."""
    result = result_text(row, rows)
    costs = []
    for cost in COST_NAMES:
        ratio = ratio_text(row, cost)
        costs.append(cost_text(row, cost) + ("" if ratio == UNKNOWN else f"\n{ratio}x"))
    label, steps = row.order.label, str(row.inner_steps)
    setting = {name: setting_cell(row, key) for key, name in varied_names(rows).items()}
    below = [] if with_columns else [f"{name} {value}" for name, value in setting.items()]
    columns = setting.values() if with_columns else ()
    order = "\n".join([label, *below])
    return [order, steps, *columns, seeds_text(row), result, *costs, cosine_text(row)]
