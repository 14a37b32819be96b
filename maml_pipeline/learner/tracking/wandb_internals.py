"""Private or unstable parts of W&B and wandb_workspaces; no other file uses any.

Each function says which part it uses and why. `tests/test_internals_wandb.py` fails when an upgrade
changes one of them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maml_pipeline.errors import UserError

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as ws

HEADER_BYTES = 64
"""A smaller log has no record: W&B writes a header and then whole blocks."""


# Settings and errors ----------------------------------------------------------------------------


def global_settings() -> Any:
    """Return W&B's settings, from the environment and the files that `wandb init` writes.

    Private: `.settings` of the object that `wandb.setup()` returns. There is no public way to read the
    settings before a run is started.
    """
    import wandb  # late: it takes a second to import

    return wandb.setup().settings


def use_run_id_in_sweep(run_id: str) -> None:
    """Let `wandb.init` start or resume this run in a sweep, where it ignores its argument `id`.

    Private: writes `run_id` into the global settings.
    """
    global_settings().run_id = run_id


def api_error() -> type[Exception]:
    """Return the class of the error that a failed API request raises.

    Private: `wandb.sdk.lib.service`. The error is not a `wandb.Error`.
    """
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return WandbApiFailedError


# Logs on disk -----------------------------------------------------------------------------------


def is_offline(log: Path) -> bool:
    """Tell whether a log was written offline, from the name of its folder."""
    return log.parent.name.startswith("offline-")


def is_synced(log: Path) -> bool:
    """Tell whether `wandb sync` has uploaded a log, from the marker that it writes beside it."""
    return log.with_suffix(".wandb.synced").exists()


def is_empty(log: Path) -> bool:
    """Tell whether a log has no record: its process was killed before W&B wrote the first block."""
    return log.stat().st_size < HEADER_BYTES


def read_records(log: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a log, also of a run that is still active.

    Unstable: the output of `wandb leet inspect --json`, and the layout of its records. W&B's API reads
    runs from a server only.

    Args:
        log: A file `run-<id>.wandb`.

    Yields:
        The records in order, each with its `type`.

    Raises:
        UserError: W&B cannot read the file.
        ValueError: Its output is not JSON.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip() or "no reason given"
        raise UserError(f"{log.name} cannot be read: {reason.splitlines()[-1]}")
    yield from map(json.loads, done.stdout.splitlines())


# Saved workspaces -------------------------------------------------------------------------------


class ProjectNotFoundError(Exception):
    """The project does not exist, or the user has no access to it."""


def set_workspace_id(workspace: "ws.Workspace", name: str) -> bool:
    """Give a workspace a fixed internal name, and the id of the saved one of that name if there is one.

    Saving it then replaces the earlier one instead of adding another. Private: `_internal_name` and
    `_internal_id` of a workspace, and `internal.get_view_dict`.

    Args:
        workspace: Not saved yet.
        name: `nw-<letters and digits>-v`, the form that W&B requires.

    Returns:
        Whether there is a saved workspace of this name.

    Raises:
        ProjectNotFoundError: The project does not exist, or the user has no access to it.
    """
    from wandb_workspaces.workspaces import internal

    workspace._internal_name = name
    try:
        view = internal.get_view_dict(workspace.entity, workspace.project, name.split("-")[1])
    except ValueError as error:  # the text is all that tells the two cases apart
        if str(error).startswith("Project"):
            raise ProjectNotFoundError(str(error)) from error
        return False
    workspace._internal_id = view["id"]
    return True
