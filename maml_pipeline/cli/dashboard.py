"""`maml dashboard`: save a W&B workspace and report that compare the gradient orders."""

from collections.abc import Sequence

from maml_pipeline.cli.parser import Parser
from maml_pipeline.environment import WANDB_SILENT
from maml_pipeline.errors import UserError
from maml_pipeline.limits import check_at_least


def run(arguments: Sequence[str]) -> None:
    """Save the workspace and the report of a project, or update them.

    Args:
        arguments: Those after `maml dashboard`.

    Raises:
        UserError: An argument is invalid, W&B cannot be used, or the project does not exist.
    """
    parser = Parser(
        prog="maml dashboard",
        description="Save a workspace and a report that compare the gradient orders in a W&B project. "
        "Running the same command again updates both.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--entity", required=True, metavar="NAME", help="team or user that owns the project")
    add(
        "--project",
        required=True,
        metavar="NAME",
        help="the runs' project: maml_pipeline, or as set by WANDB_PROJECT",
    )
    add("--measure", metavar="NAME", default="accuracy", help="accuracy, loss, ... (default: accuracy)")
    add(
        "--inner_steps",
        type=int,
        default=3,
        metavar="K",
        help="number of inner steps at test (default: 3)",
    )
    settings = parser.parse_args(arguments)
    # Imported late: Lightning takes seconds to import, which help must not.
    from maml_pipeline.learner.tracking.session import logged_in, server_answers

    check_at_least("--inner_steps", settings.inner_steps, 0)
    if not WANDB_SILENT.is_set():
        WANDB_SILENT.set("true")  # otherwise W&B prints both URLs too
    if not logged_in():
        raise UserError(
            "a dashboard needs a W&B account: run `wandb login`, or set WANDB_API_KEY; "
            "without one, `maml report RUN_DIR` and `wandb leet` compare runs on this machine"
        )
    if not server_answers():
        raise UserError("W&B does not answer; check the network, and WANDB_BASE_URL if it is set")

    from maml_pipeline.report.dashboard import save_dashboard  # late: importing W&B takes a second

    workspace, report = save_dashboard(
        settings.entity, settings.project, settings.measure, settings.inner_steps
    )
    print(f"Workspace: {workspace}")
    print(f"Report: {report}")
