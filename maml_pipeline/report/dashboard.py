"""The comparison of the orders in W&B: a saved workspace and a report with the same panels."""

import re

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from maml_pipeline.errors import UserError, first_line
from maml_pipeline.learner.tracking.logs import STEP_METRIC
from maml_pipeline.learner.tracking.wandb_internals import (
    ProjectNotFoundError,
    api_error,
    set_workspace_id,
)

PEAK = "memory/meta_step_peak_bytes"
GAPS = {"order_gap/cosine": "cosine", "order_gap/relative_error": "relative error"}
COSTS = (PEAK, "speed/meta_step_ms", "speed/meta_step_flops", "order_gap/cosine")


def save_dashboard(entity: str, project: str, measure: str, inner_steps: int) -> tuple[str, str]:
    """Save the workspace and the report; earlier ones for the same measure are replaced.

    Args:
        entity: The team or user that owns the project.
        project: A project with runs.
        measure: The measure of the test, such as `accuracy`.
        inner_steps: Number of inner steps at test to show.

    Returns:
        The URLs of the workspace and of the report.

    Raises:
        UserError: The project does not exist, or W&B refuses a request.
    """
    chosen = (entity, project, measure, inner_steps)
    try:
        saved = build_workspace(*chosen)
        written = build_report(*chosen)
        set_workspace_id(saved, workspace_name(measure))
        for known in wandb.Api().reports(f"{entity}/{project}"):
            if known.display_name == written.title:
                written.id = known.id
        return saved.save().url, written.save().url
    except ProjectNotFoundError as error:
        raise UserError(
            f"there is no project {entity}/{project} in W&B, or you have no access to it; "
            "`maml sync RUN_DIR` creates it with the first run"
        ) from error
    except (wandb.Error, api_error(), ValueError, OSError) as error:
        raise UserError(f"W&B refused: {first_line(error)}") from error


def title(measure: str) -> str:
    """Return the title of both; each measure has a workspace and a report of its own."""
    return f"Gradient orders by {measure}"


def workspace_name(measure: str) -> str:
    """Return the internal name of the workspace, in the form `nw-...-v` that W&B requires."""
    return f"nw-mamlorders{re.sub('[^a-z0-9]', '', measure.lower())}-v"


def panels(measure: str, inner_steps: int) -> dict[str, list[wr.interface.PanelTypes]]:
    """Build the panels by section; runs are grouped by experiment and order.

    Args:
        measure: The measure of the test, such as `accuracy`.
        inner_steps: The test result is shown before the first inner step and after each of these.
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


def build_workspace(entity: str, project: str, measure: str, inner_steps: int) -> ws.Workspace:
    """Build the workspace; its table of runs is the table of final figures."""
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


def build_report(entity: str, project: str, measure: str, inner_steps: int) -> wr.Report:
    """Build the report: a heading and the panels of each section.

    The last section shows its table of runs, which is the table of final figures.
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
        description="First order, second order and what lies between them, on the same tasks.",
        blocks=blocks,
        width="fluid",
    )
