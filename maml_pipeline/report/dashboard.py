"""The comparison of the orders in W&B: what a saved workspace and a report of it hold."""

import re

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from maml_pipeline.learner.tracking.logs import STEP_METRIC

PEAK = "memory/meta_step_peak_bytes"
GAPS = {"order_gap/cosine": "cosine", "order_gap/relative_error": "relative error"}
COSTS = (PEAK, "speed/meta_step_ms", "speed/meta_step_flops", "order_gap/cosine")


def title(measure: str) -> str:
    """Return what both are called; a second one for another measure stands beside the first."""
    return f"Gradient orders by {measure}"


def workspace_name(measure: str) -> str:
    """Return the name that a workspace is found again by; W&B's form for it is `nw-...-v`."""
    return f"nw-mamlorders{re.sub('[^a-z0-9]', '', measure.lower())}-v"


def panels(measure: str, inner_steps: int) -> dict[str, list[wr.interface.PanelTypes]]:
    """Build the panels by section, each with the runs as they are grouped: by experiment and order.

    Args:
        measure: What was tested, such as `accuracy`.
        inner_steps: Inner steps at test: so many are shown, and that before the first.
    """
    return {
        "What second order buys, and what it costs": [
            wr.ScatterPlot(
                title=f"Test {measure} against peak memory of a meta-step",
                x=wr.SummaryMetric(PEAK),
                y=wr.SummaryMetric(f"test/{measure}"),
                log_x=True,
                layout=wr.Layout(x=0, y=0, w=12, h=8),
            ),
            _curve(f"Validation {measure}", f"val/{measure}", x=12),
        ],
        "Order gap": [
            _curve(f"First- against second-order meta-gradient: {name}", metric, x=12 * number)
            for number, (metric, name) in enumerate(GAPS.items())
        ],
        "Inner steps": [
            wr.BarPlot(
                title=f"Test {measure} after each inner step",
                metrics=[
                    wr.SummaryMetric(f"test/{measure}_step_{step}") for step in range(inner_steps + 1)
                ],
                orientation="v",
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
                layout=wr.Layout(x=0, y=0, w=24, h=8),
            )
        ],
        "Final figures": [
            wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=24, h=12)),
        ],
    }


def _curve(name: str, metric: str, x: int) -> wr.LinePlot:
    return wr.LinePlot(
        title=name,
        x=STEP_METRIC,
        y=[metric],
        title_x="meta-step",
        aggregate=True,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        smoothing_type="none",
        layout=wr.Layout(x=x, y=0, w=12, h=8),
    )


def columns(measure: str) -> list[str]:
    """Return the columns of the table of final figures."""
    figures = (f"test/{measure}", f"test/{measure}_ci95", *COSTS)
    return ["run:displayName", "run:jobType", *(f"summary:{figure}" for figure in figures)]


def workspace(entity: str, project: str, measure: str, inner_steps: int) -> ws.Workspace:
    """Build the saved workspace: its table of runs is the table of final figures."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=title(measure),
        sections=[
            ws.Section(
                name=name,
                panels=shown,
                is_open=True,
                panel_settings=ws.SectionPanelSettings(x_axis=STEP_METRIC),
            )
            for name, shown in panels(measure, inner_steps).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP_METRIC),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric("Group"), expr.Metric("JobType")], pinned_columns=columns(measure)
        ),
    )


def report(entity: str, project: str, measure: str, inner_steps: int) -> wr.Report:
    """Build the report: for each section a heading, and its panels over the same runs.

    The last one shows its table of runs, which is the table of final figures.
    """
    blocks: list[wr.interface.BlockTypes] = []
    for name, shown in panels(measure, inner_steps).items():
        runs = wr.Runset(
            entity=entity,
            project=project,
            name="Experiments and orders",
            groupby=["group", "jobType"],
            pinned_columns=columns(measure),
        )
        is_table = name == "Final figures"
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runs], panels=shown, hide_run_sets=not is_table)]
    return wr.Report(
        entity=entity,
        project=project,
        title=title(measure),
        description="First order, second order and checkpointed second order on the same tasks.",
        blocks=blocks,
        width="fluid",
    )
