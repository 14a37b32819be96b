"""The comparison as a table: single numbers on the page, up to three lines per row on the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import EngFormatter
from rich.console import Console, JustifyMethod
from rich.table import Table

from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.style import METHOD_STYLES
from maml_pipeline.runs.run import Estimate
from maml_pipeline.text import in_one_notation, printable

UNKNOWN = "-"
UNFINISHED = "* not finished, and not part of the result"
SPLITS = {"test": "test", "val": "validation"}

COST_UNITS = {"peak_bytes": (1, "B"), "meta_step_ms": (1e-3, "s"), "flops": (1, "FLOP")}
"""Factor from a cost's own unit to the one that it is written in."""

COST_NAMES = {
    "peak_bytes": "peak memory",
    "meta_step_ms": "time of a meta-step",
    "flops": "FLOPs of a meta-step",
}


@dataclass(frozen=True)
class Column:
    """A column of the page's table.

    Args:
        group: The heading that neighbouring columns share.
        name: The heading below it; empty in a group of one column.
        cells: One per row.
    """

    group: str
    name: str
    cells: list[str]

    @property
    def heading(self) -> str:
        """The heading in one line."""
        return f"{self.group}, {self.name}" if self.name else self.group


def table_columns(rows: Sequence[ComparisonRow]) -> list[Column]:
    """Return the columns for the rows of one experiment; columns without a single value are left out."""
    measure, costs = measure_heading(rows), COST_NAMES.items()
    columns: list[tuple[str, str, Callable[[ComparisonRow], str]]] = [
        ("order", "", lambda row: METHOD_STYLES[row.method].label),
        ("inner steps", "", lambda row: str(row.inner_steps)),
        ("seeds", "", seeds_text),
        (measure, "mean", lambda row: _result_part(row, rows, lambda result: result.mean)),
        (measure, "± 95 % CI", lambda row: _result_part(row, [row], lambda result: result.ci95)),
        (measure, "lowest result", lambda row: _range_text(row, 0)),
        (measure, "highest result", lambda row: _range_text(row, 1)),
    ]
    for cost, name in costs:
        columns.append((name, "mean", lambda row, cost=cost: cost_text(row, cost)))  # type: ignore[misc]
        columns.append((name, "ratio", lambda row, cost=cost: ratio_text(row, cost)))  # type: ignore[misc]
    columns.append(("cosine of the orders", "", cosine_text))
    filled = [Column(group, name, [cell(row) for row in rows]) for group, name, cell in columns]
    return [column for column in filled if {*column.cells} != {UNKNOWN}]


def print_table(title: str, rows: Sequence[ComparisonRow]) -> None:
    """Print the rows of one experiment as a table, and below it the folders of their runs."""
    # Names may look like markup: print all text literally.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"\n{title}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2 if console.width >= 100 else 1, 0, 0))
    headings = (
        *("order", "inner\nsteps", "seeds", f"{measure_heading(rows)}\n± 95 % CI"),
        *("peak\nmemory", "time", "FLOPs", "cosine of\norders"),
    )
    # A column without a single value is left out.
    columns = [*zip(*(_stacked_cells(row, rows) for row in rows), strict=True)]
    known = [number for number, cells in enumerate(columns) if {*cells} != {UNKNOWN}]
    cells = [*zip(*(columns[number] for number in known), strict=True)]
    for number, heading in enumerate(headings[number] for number in known):
        justify: JustifyMethod = "left" if number == 0 else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row_cells in cells:
        table.add_row(*row_cells)
    console.print(table)
    if any(row.unfinished for row in rows):
        console.print(UNFINISHED)
    console.print("Runs:")
    for row in rows:
        for run in row.runs:
            console.print(f"  {run.folder}", soft_wrap=True)


def _stacked_cells(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> list[str]:
    """Return the cells of a row on the terminal, each in up to three lines."""
    result = UNKNOWN
    if row.result is not None:
        mean, margin = in_one_notation(row.result.mean, row.result.ci95)
        result = mean if math.isnan(row.result.ci95) else f"{mean} ± {margin}"
        if row.result_range is not None:
            result += "\n" + " to ".join(in_one_notation(*row.result_range))
        if row.split != _split(rows):
            result += f"\n({SPLITS[row.result.split]})"
    costs = []
    for cost in COST_NAMES:
        ratio = ratio_text(row, cost)
        costs.append(cost_text(row, cost) + ("" if ratio == UNKNOWN else f"\n{ratio}x"))
    label, steps = METHOD_STYLES[row.method].label, str(row.inner_steps)
    return [label, steps, seeds_text(row), result, *costs, cosine_text(row)]


# Cells ------------------------------------------------------------------------------------------


def measure_heading(rows: Sequence[ComparisonRow]) -> str:
    """Return the measure with the split of the results, such as `test accuracy`."""
    return f"{SPLITS[_split(rows)]} {printable(rows[0].runs[0].measure)}"


def _split(rows: Sequence[ComparisonRow]) -> str:
    return "test" if any(row.split == "test" for row in rows) else "val"


def seeds_text(row: ComparisonRow) -> str:
    """Return the seeds, those that are not part of the result with a star."""
    return ", ".join(f"{run.seed}{'*' if run in row.unfinished else ''}" for run in row.runs)


def _result_part(
    row: ComparisonRow, rows: Sequence[ComparisonRow], part: Callable[[Estimate], float]
) -> str:
    """Return the mean or the interval, with the split's name if it is not that of the heading."""
    if row.result is None:
        return UNKNOWN
    value = part(row.result)
    if math.isnan(value) and not math.isnan(row.result.mean):
        return UNKNOWN  # no interval was logged
    _, text = in_one_notation(row.result.mean, value)
    return text if row.split == _split(rows) else f"{text} ({SPLITS[row.result.split]})"


def _range_text(row: ComparisonRow, end: int) -> str:
    return UNKNOWN if row.result_range is None else in_one_notation(*row.result_range)[end]


def cost_text(row: ComparisonRow, cost: str) -> str:
    """Return a cost in three significant digits, such as `1.52 MB`; `-` if it is unknown."""
    value, (factor, unit) = row.mean(cost), COST_UNITS[cost]
    return UNKNOWN if value is None else with_unit(value * factor, unit)


def with_unit(value: float, unit: str) -> str:
    """Return a number in three significant digits with an SI prefix: `272 B`, `1.52 MB`."""
    if not math.isfinite(value):
        return str(value)
    is_count = value == 0 or (abs(value) < 1000 and value == round(value))
    digits_before = 1 if is_count else math.floor(math.log10(abs(value))) % 3 + 1
    return str(EngFormatter(unit, places=0 if is_count else 3 - digits_before)(value))


def ratio_text(row: ComparisonRow, cost: str) -> str:
    """Return a cost as a multiple of first order's; `-` if it is unknown."""
    ratio = row.ratio(cost)
    return UNKNOWN if ratio is None else f"{ratio:.2f}"


def cosine_text(row: ComparisonRow) -> str:
    """Return the mean cosine of the two orders' meta-gradients."""
    cosine = row.mean("gap_cosine")
    return UNKNOWN if cosine is None else f"{cosine:.3f}"
