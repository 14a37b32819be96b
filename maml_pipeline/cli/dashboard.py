"""`maml dashboard`: the comparison of the orders, ready made in W&B."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from maml_pipeline.cli.parser import Parser
from maml_pipeline.environment import WANDB_SILENT
from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking.session import first_line, logged_in, server_answers

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws


def run(arguments: Sequence[str]) -> None:
    """Create the workspace and the report of a project, or bring them up to date.

    Args:
        arguments: Those after `maml dashboard`.

    Raises:
        UserError: The person can put it right.
    """
    parser = Parser(
        prog="maml dashboard",
        description="Save a workspace and a report that compare the gradient orders in a W&B project. "
        "The same command brings both up to date.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--entity", required=True, help="team or user that the project belongs to")
    add("--project", required=True, help="its name; runs are in maml_pipeline, or in WANDB_PROJECT")
    add("--measure", default="accuracy", help="what was tested: accuracy, loss, ... (default: accuracy)")
    add("--inner_steps", type=int, default=3, help="inner steps at test that are shown (default: 3)")
    settings = parser.parse_args(arguments)
    if settings.inner_steps < 0:
        raise UserError(f"--inner_steps is {settings.inner_steps}; it must be 0 or more")
    if not WANDB_SILENT.is_set():
        WANDB_SILENT.set("true")  # otherwise W&B prints both addresses a second time
    if not logged_in():
        raise UserError(
            "a dashboard needs a W&B account: run `wandb login`, or set WANDB_API_KEY; "
            "without one, `maml report RUN_DIR` and `wandb leet` compare runs on this machine"
        )
    if not server_answers():
        raise UserError(
            "W&B does not answer; look at the network, and at WANDB_BASE_URL where it is set"
        )

    import wandb  # late: it takes a second to import
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    from maml_pipeline.report import dashboard

    chosen = (settings.entity, settings.project, settings.measure, settings.inner_steps)
    try:
        workspace, report = dashboard.workspace(*chosen), dashboard.report(*chosen)
        _find_workspace(workspace, dashboard.workspace_name(settings.measure))
        _find_report(report)
        print(f"Workspace: {workspace.save().url}")
        print(f"Report: {report.save().url}")
    except UserError:
        raise
    except (wandb.Error, WandbApiFailedError, ValueError, OSError) as error:
        raise UserError(f"W&B refused: {first_line(error)}") from error


def _find_workspace(workspace: "ws.Workspace", name: str) -> None:
    """Take the place of the workspace that is there already."""
    from wandb_workspaces.workspaces import internal

    workspace._internal_name = name
    try:
        view = internal.get_view_dict(workspace.entity, workspace.project, name.split("-")[1])
    except ValueError as error:
        if str(error).startswith("Project"):
            raise UserError(
                f"there is no project {workspace.entity}/{workspace.project} in W&B, or it is not yours "
                "to see; `maml sync RUN_DIR` makes it with the first run"
            ) from error
        return
    workspace._internal_id = view["id"]


def _find_report(report: "wr.Report") -> None:
    """Take the place of the report of the same title, where there is one."""
    import wandb

    for known in wandb.Api().reports(f"{report.entity}/{report.project}"):
        if known.display_name == report.title:
            report.id = known.id
