"""The tables of docs/results.md, from what results/*.json hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from maml_pipeline.report.table import with_unit
from maml_pipeline.runs.run import mean
from maml_pipeline.text import duration, in_one_notation
from maml_pipeline.varied import value_text

ALPHA = "α"  # noqa: RUF001


def table(results: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> str:
    """Return the Markdown table of some results.

    Args:
        results: From `results_of`.
        steps: The numbers of inner steps at test, a column for each.
    """
    settings = (ALPHA, "meta-steps", "seeds")
    of_a_run = ("peak memory", "time of a run")
    head = ["task", "order", *settings, *map(_after, steps), "in print", *of_a_run]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for row in results:
        of_steps = [row["result"].get(str(k)) for k in steps]
        lines.append(
            [
                *(row["task"], row["method"], f"{row['inner_lr']:g}", f"{row['meta_steps']:,}"),
                _seeds(row),
                *("-" if each is None else result_text(row["measure"], each) for each in of_steps),
                _published(row),
                with_unit(row["peak_bytes"], "B"),
                duration(mean(row["seconds"])),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def result_text(measure: str, estimate: Mapping[str, Any]) -> str:
    """Return a mean and its interval as text, an accuracy in per cent; `-` if it is not finite.

    Args:
        measure: Name of the measure.
        estimate: Its `mean` and `ci95`.
    """
    value, margin = estimate["mean"], estimate["ci95"]
    if value is None or margin is None:
        return "-"
    if measure == "accuracy":
        return f"{100 * value:.1f} ± {100 * margin:.1f} %"
    return " ± ".join(in_one_notation(value, margin))


def mean_text(measure: str, value: float | None) -> str:
    """Return a mean as text, an accuracy in per cent; `-` if it is not finite."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{value:.2f}"


def _seeds(row: Mapping[str, Any]) -> str:
    """Return the number of seeds, such as 3, or 2 of 3 if one diverged."""
    ended, diverged = len(row["seeds"]), len(row.get("diverged_seeds", ()))
    return f"{ended} of {ended + diverged}" if diverged else str(ended)


def _published(row: Mapping[str, Any]) -> str:
    """Return the results in print, by increasing number of inner steps."""
    values = row["published"].values()
    return " / ".join(mean_text(row["measure"], value) for value in values) or "-"


def _after(steps: int) -> str:
    return f"after {steps} step{'s' if steps != 1 else ''}"


def search_table(task: str, measure: str, search: Mapping[str, Any]) -> str:
    """Return the table of the best validation results of a search.

    Args:
        task: In its heading.
        measure: Name of the measure.
        search: From `search_of`.
    """
    values = [value_text(value) for value in search["values"]]
    lines = [
        " | ".join((f"{task}, order", *(f"{ALPHA} = {value}" for value in values))),
        "|".join(["---", *["---:"] * len(values)]),
    ]
    for order, found in search["validation"].items():
        cells = (mean_text(measure, found.get(value)) for value in values)
        lines.append(" | ".join((order, *cells)))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
