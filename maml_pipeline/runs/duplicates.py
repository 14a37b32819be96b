"""Removing duplicates of runs: copies, and W&B logs or summaries of runs that were found too."""

import math
from collections.abc import Sequence

from maml_pipeline.run_folder import CONFIG
from maml_pipeline.runs.run import Run


def remove_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keep the most complete of several copies of a run.

    Args:
        runs: In any order.

    Returns:
        The runs that are kept, in their order, and one line for each duplicate.
    """
    kept: list[Run] = []
    lines: list[str] = []
    for run in sorted(runs, key=_completeness, reverse=True):
        original = next((other for other in kept if _is_duplicate(run, other)), None)
        if original is None:
            kept.append(run)
        else:
            lines.append(f"{run.folder}: it is a copy of {original.folder}")
    return [run for run in runs if any(run is one for one in kept)], lines


def _completeness(run: Run) -> tuple[object, ...]:
    """Return the sort key of copies: the largest is kept."""
    is_folder = (run.source / CONFIG).is_file()
    return (run.is_finished, run.meta_steps, is_folder, not run.is_summary)


def _is_duplicate(run: Run, other: Run) -> bool:
    """Tell whether two runs are copies: they have logged the same wherever both have logged a value.

    Two runs with the same settings and seed may log the same losses, but not the same times.
    """
    if (run.experiment, run.name) != (other.experiment, other.name):
        return False
    if run.settings != other.settings:
        return False
    own, others = (_logged(one, run.is_summary or other.is_summary) for one in (run, other))
    shared = own.keys() & others.keys()
    return bool(shared) and all(_is_same(own[key], others[key]) for key in shared)


def _logged(run: Run, without_times: bool) -> dict[tuple[int, str], float]:
    """Return every logged value by meta-step and metric.

    Args:
        run: Any run.
        without_times: Omit times and memory, of which a trade-off's summary has only the medians.
    """
    return {
        (int(record["step"]), metric): value
        for record in run.history
        for metric, value in record.items()
        if metric != "step" and not (without_times and metric.startswith(("speed/", "memory/")))
    }


def _is_same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
