"""The comparison as the page's table: its columns, and every value as text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.ticker import EngFormatter

from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.gain import share_of_gain
from maml_pipeline.runs.run import Estimate
from maml_pipeline.text import in_one_notation, printable
from maml_pipeline.varied import short_names, value_text

UNKNOWN = "-"
UNFINISHED = "* not finished, and not part of the result"
CHOSEN = {True: "yes", False: "no", None: UNKNOWN}
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
        ("order", "", lambda row: row.order.label),
        ("inner steps", "", lambda row: str(row.inner_steps)),
        *((name, "", partial(setting_cell, key=key)) for key, name in varied_names(rows).items()),
        (f"best validation {printable(rows[0].runs[0].measure)}", "", validation_text),
        ("chosen", "", lambda row: CHOSEN[row.chosen]),
        ("seeds", "", seeds_text),
        (measure, "mean", lambda row: _result_part(row, rows, lambda result: result.mean)),
        (measure, "± 95 % CI", lambda row: _result_part(row, [row], lambda result: result.ci95)),
        (measure, "lowest result", lambda row: _range_text(row, 0)),
        (measure, "highest result", lambda row: _range_text(row, 1)),
        ("share of second order's gain", "", lambda row: share_text(row, rows)),
    ]
    for cost, name in costs:
        columns.append((name, "mean", lambda row, cost=cost: cost_text(row, cost)))  # type: ignore[misc]
        columns.append((name, "ratio", lambda row, cost=cost: ratio_text(row, cost)))  # type: ignore[misc]
    columns.append(("cosine of the orders", "", cosine_text))
    filled = [Column(group, name, [cell(row) for row in rows]) for group, name, cell in columns]
    return [column for column in filled if {*column.cells} != {UNKNOWN}]


def table_notes(rows: Sequence[ComparisonRow]) -> list[str]:
    """Return what must be known to read the table: what a star means, and how times were measured."""
    notes = [UNFINISHED] if any(row.unfinished for row in rows) else []
    parallel = max(row.parallel_cells for row in rows)
    if parallel > 1:
        notes.append(f"Times were measured with up to {parallel} cells side by side")
    return notes


# Cells ------------------------------------------------------------------------------------------


def measure_heading(rows: Sequence[ComparisonRow]) -> str:
    """Return the measure with the split of the results, such as `test accuracy`."""
    return f"{SPLITS[split_of(rows)]} {printable(rows[0].runs[0].measure)}"


def split_of(rows: Sequence[ComparisonRow]) -> str:
    """Return the split of the results: `test` if any row was tested."""
    return "test" if any(row.split == "test" for row in rows) else "val"


def varied_names(rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """Return a short name for each varied key."""
    return {key: printable(name) for key, name in short_names(rows[0].setting).items()}


def setting_cell(row: ComparisonRow, key: str) -> str:
    """Return the row's value of a varied key."""
    return value_text(row.setting[key])


def validation_text(row: ComparisonRow) -> str:
    """Return the best validation result by which a setting is chosen; `-` if it was not compared."""
    return UNKNOWN if row.validation is None else in_one_notation(row.validation, row.validation)[0]


def seeds_text(row: ComparisonRow) -> str:
    """Return the seeds, those that are not part of the result with a star."""
    return ", ".join(f"{run.seed}{'*' if run in row.unfinished else ''}" for run in row.runs)


def result_text(row: ComparisonRow, rows: Sequence[ComparisonRow], with_range: bool = True) -> str:
    """Return the result with its interval and, on a second line, the range over seeds."""
    if row.result is None:
        return UNKNOWN
    mean, margin = in_one_notation(row.result.mean, row.result.ci95)
    result = mean if math.isnan(row.result.ci95) else f"{mean} ± {margin}"
    if with_range and row.result_range is not None:
        result += "\n" + " to ".join(in_one_notation(*row.result_range))
    return result if row.split == split_of(rows) else f"{result}\n({SPLITS[row.result.split]})"


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
    return text if row.split == split_of(rows) else f"{text} ({SPLITS[row.result.split]})"


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


def share_text(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> str:
    """Return the share of second order's gain over first order, such as `83 %`; `-` if it is unknown."""
    share = share_of_gain(row, rows)
    return UNKNOWN if share is None else f"{round(100 * share):,} %"


def cosine_text(row: ComparisonRow) -> str:
    """Return the mean cosine of the two orders' meta-gradients."""
    cosine = row.mean("gap_cosine")
    return UNKNOWN if cosine is None else f"{cosine:.3f}"
