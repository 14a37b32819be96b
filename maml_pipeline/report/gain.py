"""What second order gains over first order, and the share of it that each order reaches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from maml_pipeline.gradient_order import SECOND, Method
from maml_pipeline.report.comparison import ComparisonRow


class Gain(NamedTuple):
    """The results of first and of second order, on one split."""

    first: float
    second: float
    split: str

    def share(self, result: float) -> float:
        """Return which share of the way from first to second order a result is; 1 is second order's."""
        return (result - self.first) / (self.second - self.first)


def gain(rows: Sequence[ComparisonRow], inner_steps: int) -> Gain | None:
    """Return the gain with a number of inner steps.

    Args:
        rows: Those of one experiment.
        inner_steps: Inner steps in training.

    Returns:
        `None` if either order is missing or has several settings, or if second order is not better than
        first order by more than the confidence interval of either.
    """
    own = [row for row in rows if row.inner_steps == inner_steps and not row.is_outdone]
    first = [row for row in own if row.order.first_order]
    second = [row for row in own if _is_exact_second_order(row)]
    second = [row for row in second if row.order == second[0].order]  # unrolled, if it was trained
    if len(first) != 1 or len(second) != 1:
        return None
    start, end = first[0].result, second[0].result
    if start is None or end is None or start.split != end.split:
        return None
    better = (end.mean - start.mean) * (1 if second[0].runs[0].higher_is_better else -1)
    is_known = math.isfinite(better) and better > max(start.ci95, end.ci95)
    return Gain(start.mean, end.mean, start.split) if is_known else None


def _is_exact_second_order(row: ComparisonRow) -> bool:
    return row.order.degree == SECOND and row.order.method is not Method.HESSIAN_FREE


def share_of_gain(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> float | None:
    """Return the share of second order's gain that a row reaches on the same split, if there is a gain.

    Args:
        row: Any row.
        rows: Those of its experiment.
    """
    known = gain(rows, row.inner_steps)
    if known is None or row.result is None or not math.isfinite(row.result.mean):
        return None
    if row.result.split != known.split:
        return None
    return known.share(row.result.mean)
