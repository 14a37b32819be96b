"""Runs as a table on the terminal: one line per run, or two where the terminal is narrow."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from maml_pipeline.runs.listing import ListedRun
from maml_pipeline.runs.run import display_path
from maml_pipeline.runs.state import RunState
from maml_pipeline.text import in_one_notation, printable

UNKNOWN = "-"

HEADINGS = ("experiment", "order", "k", "seed", "alpha", "meta-steps", "state", "result")
LEFT = ("experiment", "order", "state", "measure", "folder")
"""Headings of the columns that are text, which are aligned at the left."""

LEAST_WIDTH = 8
"""Of the experiment's column on a narrow terminal; below it is the folder, which usually repeats it."""


def print_runs(runs: Sequence[ListedRun], width: int | None = None) -> None:
    """Print a table of runs.

    Args:
        runs: In the order to print.
        width: Characters per line; `None` for one line per run of any length.
    """
    headings = (*HEADINGS, "measure", "folder")
    rows = [[*_cells(run), _measure(run), display_path(run.run.source)] for run in runs]
    if width is None or _width([headings, *rows]) <= width:
        lines = _table_lines(headings, rows)
    else:
        first_lines = [row[: len(HEADINGS)] for row in rows]
        others = _width([line[1:] for line in (HEADINGS, *first_lines)]) + 1
        width = max(width, others + LEAST_WIDTH)
        heading, *above = _table_lines(HEADINGS, first_lines, width - others)
        below = [_second_line(row[-1], row[-2], width) for row in rows]
        lines = [heading, *(line for pair in zip(above, below, strict=True) for line in pair)]
    for line in [*lines, *_notes(runs)]:
        print(line)


def _notes(runs: Sequence[ListedRun]) -> list[str]:
    """Return a line for each run whose state has a reason or a Slurm job."""
    lines = []
    for listed in runs:
        state, job, reason = listed.state, listed.situation.job, listed.situation.reason
        if state is not None and (job or reason):
            by_job = f" (Slurm job {job})" if job else ""
            because = f": {reason}" if reason else ""
            verb = "" if state is RunState.FAILED else "is "
            lines.append(f"{display_path(listed.run.source)} {verb}{state}{by_job}{printable(because)}")
    return lines


def _second_line(folder: str, measure: str, width: int) -> str:
    """Return the folder at the left and the measure at the right, below the result."""
    gap = max(width - 2 - cell_len(folder) - cell_len(measure), 2)
    return f"  {folder}" if measure == UNKNOWN else f"  {folder}{' ' * gap}{measure}"


def _cells(listed: ListedRun) -> list[str]:
    fields = listed.fields
    alpha, state = fields["inner_lr"], fields["state"]
    result = UNKNOWN
    if (estimate := listed.run.result) is not None:
        mean, margin = in_one_notation(estimate.mean, estimate.ci95)
        result = mean if margin == "nan" else f"{mean} ± {margin}"
    return [
        printable(listed.run.experiment),
        fields["order"],
        str(fields["inner_steps"]),
        str(fields["seed"]),
        UNKNOWN if alpha is None else f"{alpha:g}",
        _progress(fields["meta_steps"], fields["max_steps"]),
        UNKNOWN if state is None else state,
        result,
    ]


def _progress(done: int, wanted: int | None) -> str:
    return f"{done:,}" if wanted in (None, done) else f"{done:,} of {wanted:,}"


def _measure(listed: ListedRun) -> str:
    fields = listed.fields
    return UNKNOWN if fields["split"] is None else f"{fields['split']} {printable(fields['measure'])}"


def _table_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], first_width: int | None = None
) -> list[str]:
    """Return the lines of a table, one per row.

    Args:
        headings: Of the columns.
        rows: The cells of each row.
        first_width: Largest width of the first column; `None` for no limit.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="left" if heading in LEFT else "right",
            no_wrap=True,
            max_width=first_width if number == 0 else None,
        )
    for row in rows:
        table.add_row(*row)
    # Names may look like markup: print all text literally.
    console = Console(markup=False, emoji=False, highlight=False, width=_width([headings, *rows]))
    return ["".join(part.text for part in line).rstrip() for line in console.render_lines(table)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Return the width of a table with these rows, with one space between its columns."""
    columns = [*zip(*rows, strict=True)]
    return sum(max(map(cell_len, column)) for column in columns) + len(columns) - 1
