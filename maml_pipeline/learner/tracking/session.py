"""The W&B session of this process: choosing its mode, starting it and finishing it."""

import logging
import netrc
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import requests

from maml_pipeline.environment import (
    NETRC,
    WANDB_API_KEY,
    WANDB_BASE_URL,
    WANDB_DISABLED,
    WANDB_MODE,
)
from maml_pipeline.errors import first_line
from maml_pipeline.learner.tracking.description import Description
from maml_pipeline.learner.tracking.logs import find_wandb_logs
from maml_pipeline.learner.tracking.run_id import release_wandb_ids
from maml_pipeline.learner.tracking.wandb_internals import (
    global_settings,
    is_empty,
    is_offline,
    is_synced,
    use_run_id_in_sweep,
)
from maml_pipeline.run_folder import WANDB_LOGS
from maml_pipeline.signals import Stopped

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 5
SECONDS_TO_START = 30
SECONDS_TO_FINISH = 60
"""Longest times to wait for W&B: for a response, for a W&B run to start, and for it to finish."""


def choose_wandb_mode(folder: Path) -> str:
    """Return `online`, `offline` or `disabled`: the value of `WANDB_MODE`, or online if logged in.

    A run stays offline while an earlier part of it is not uploaded, so that its parts arrive in order.

    Args:
        folder: The run's folder.
    """
    if WANDB_DISABLED.get():
        return "disabled"
    mode = WANDB_MODE.get() or global_settings().mode
    mode = "offline" if mode == "dryrun" else mode
    if mode in ("offline", "disabled"):
        return mode
    if not logged_in():
        if WANDB_MODE.is_set():
            logger.warning("W&B has no API key (`wandb login`): the run is logged offline in %s", folder)
        return "offline"
    not_uploaded = [
        log
        for logs in find_wandb_logs(folder / WANDB_LOGS).values()
        for log in logs
        if is_offline(log) and not is_synced(log) and not is_empty(log)
    ]
    if not_uploaded:
        logger.warning("W&B: the run stays offline, as it started; `maml sync %s` uploads it", folder)
        return "offline"
    if not server_answers():
        _warn_offline("no response", folder)
        return "offline"
    return "online"


def start_wandb_run(
    folder: Path, run_id: str, mode: str, about: Description, config: dict[str, Any]
) -> "wandb.Run":
    """Start or resume a W&B run; offline, with a warning, if W&B cannot be reached.

    Args:
        folder: The run's folder, where W&B writes its files.
        run_id: The W&B run's id.
        mode: `online` or `offline`.
        about: Its name, group and tags, which W&B's environment variables override.
        config: The resolved config and whatever else the W&B run's config records.
    """
    import wandb  # late: it takes a second to import

    settings = global_settings()
    project: str | None = settings.project or "maml_pipeline"
    if in_sweep := bool(settings.sweep_id):
        # A resumed run continues its own W&B run, not the one that the agent started this process for.
        use_run_id_in_sweep(run_id)
        project = None  # that of the sweep; W&B warns about any other
    online = mode == "online"
    try:
        return wandb.init(
            project=project,
            group=settings.run_group or about.group,
            job_type=settings.run_job_type or about.job_type,
            name=settings.run_name or about.name,
            tags=settings.run_tags or about.tags,
            id=None if in_sweep else run_id,
            # Absolute: W&B's service process may have been started in another working directory.
            dir=folder.absolute(),
            config=config,
            mode="online" if online else "offline",
            resume="allow" if online else None,  # offline parts are resumed by `maml sync`
            settings=wandb.Settings(
                silent=not online,
                console="off",
                init_timeout=SECONDS_TO_START,
                finish_timeout=SECONDS_TO_FINISH,
                finish_timeout_raises=True,
            ),
        )
    except Exception as error:
        if not online:
            raise
        _warn_offline(first_line(error), folder)
        # The failed session still holds the id.
        wandb.teardown()
        return start_wandb_run(folder, run_id, "offline", about, config)


def finish_tracking() -> None:
    """Finish the W&B run of this process, if any; it counts as failed while an error is raised."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    try:
        if run is not None:
            _finish(run)
    finally:
        release_wandb_ids()


def _finish(run: "wandb.Run") -> None:
    error = sys.exc_info()[1]
    try:
        if isinstance(error, Stopped) and not _is_ended_trial(error):
            run.mark_preempting()
        run.finish(exit_code=0 if error is None else 1)
    except Exception as failure:  # W&B must not fail a finished run
        logger.warning(
            "W&B did not receive the whole run (%s); `wandb sync %s` uploads it",
            first_line(failure),
            Path(run.dir).parent,
        )


def _is_ended_trial(stop: Stopped) -> bool:
    """Tell whether the agent of a sweep has ended this trial, such as one with a bad result.

    The agent sends SIGTERM. W&B hands out a trial again that was preempted, which this one was not.
    """
    return bool(global_settings().sweep_id) and stop.signum == signal.SIGTERM


def logged_in() -> bool:
    """Tell whether W&B has an API key in the environment or the netrc file; uses no network."""
    if WANDB_API_KEY.is_set():
        return True
    host = urlparse(WANDB_BASE_URL.get()).hostname or ""
    try:
        return netrc.netrc(NETRC.get()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_answers() -> bool:
    """Tell whether the W&B server sends any response; many compute nodes have no network."""
    try:
        requests.head(str(global_settings().base_url), timeout=SECONDS_TO_ANSWER)
    except requests.RequestException:
        return False
    return True


def _warn_offline(reason: str, folder: Path) -> None:
    logger.warning(
        "W&B cannot be reached (%s): the run is logged offline; `maml sync %s` uploads it later",
        reason,
        folder,
    )
