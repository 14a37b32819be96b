"""Train sine waves with 1, 3, 5 and 10 inner steps, each gradient order at its own best inner rate.

    python -m scripts.reproduce.inner_steps             # all of it: twenty minutes on two cores
    python -m scripts.reproduce.inner_steps --only sine-k3
    python -m scripts.reproduce.inner_steps --read      # nothing is trained
    python -m scripts.reproduce.inner_steps --tiny      # a trial

The inner learning rate is chosen by runs of 4,000 meta-steps. Validation and test take as many inner
steps as training. What is finished is not trained again: after an interruption, the same command
resumes.

Writes results/inner_steps.json and docs/inner_steps.png, and prints the table of docs/results.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.style import add_legend, line_style, plot_style
from scripts.reproduce.results import draw_if_complete, reproduce
from scripts.reproduce.training import INNER_LR, Training

PICTURE = Path("docs/inner_steps.png")

STEPS = (1, 3, 5, 10)
ORDERS = ("first", "truncated-1", "truncated-2", "second")
TINY = (
    *("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--probes.every=10"),
    *("--data.val_tasks=10", "--data.test_tasks=20"),
)


def _training(k: int) -> Training:
    # Truncated to k steps or more, an order is second order.
    orders = [order for order in ORDERS if not order.startswith("truncated") or int(order[-1]) < k]
    return Training(
        name=f"sine-k{k}",
        task=f"sine, 10 shots, k = {k}",
        methods={order: order.replace("-", " ") for order in orders},
        flags=(
            *("--config=sine", "--config=cpu", "--parallel=2"),
            *(f"--inner_steps={k}", f"--model.eval_inner_steps={k}"),
        ),
        search=(f"--vary={INNER_LR}=0.001,0.003,0.01,0.03", "--trainer.max_steps=4000"),
        final=("--seeds=0,1,2", "--trainer.max_steps=20000"),
        tiny=TINY,
    )


TRAININGS = [_training(k) for k in STEPS]


def draw_steps(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw result, memory and time of a meta-step over the number of inner steps.

    Args:
        results: Rows of results/inner_steps.json.
    """

    def result(row: Mapping[str, Any], part: str) -> float:
        found = row["result"][str(row["inner_steps"])][part]
        return math.nan if found is None else float(found)  # of a run that diverged

    with plot_style():
        figure = Figure((8.2, 3.0), layout="constrained")
        loss, memory, time = figure.subplots(1, 3)
        _draw(loss, results, partial(result, part="mean"), partial(result, part="ci95"))
        _draw(memory, results, lambda row: row["peak_bytes"] / 1e3)
        _draw(time, results, lambda row: row["meta_step_ms"])
        loss.set_ylabel("test loss after k inner steps")
        memory.set_ylabel("peak memory of a meta-step, kB")
        time.set_ylabel("time of a meta-step, ms")
        memory.set_ylim(bottom=0)
        time.set_ylim(bottom=0)
        add_legend(figure)
    return figure


def _draw(
    ax: Axes,
    results: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
    margin: Callable[[Mapping[str, Any]], float] | None = None,
) -> None:
    """Draw a value of each order over the number of inner steps."""
    for order in ORDERS:
        rows = [row for row in results if row["order"] == order]
        steps, values = [row["inner_steps"] for row in rows], [value(row) for row in rows]
        margins = None if margin is None else [margin(row) for row in rows]
        ax.errorbar(
            steps, values, margins, capsize=2, elinewidth=1, **line_style(GradientOrder.parse(order))
        )
    ax.set_xticks(STEPS)
    ax.set_xlabel("inner steps k")


def main() -> None:
    """Train, write the results, and draw."""
    places = reproduce(__doc__ or "", TRAININGS, STEPS, "inner_steps.json")
    draw_if_complete(places, TRAININGS, PICTURE, draw_steps)


if __name__ == "__main__":
    main()
