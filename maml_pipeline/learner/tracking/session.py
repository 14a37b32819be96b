"""The W&B session of this process: begun with a stable id, online where that can be, and ended."""

import contextlib
import fcntl
import logging
import netrc
import re
import secrets
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlparse

import requests

from maml_pipeline.environment import (
    NETRC,
    WANDB_API_KEY,
    WANDB_BASE_URL,
    WANDB_DISABLED,
    WANDB_MODE,
)
from maml_pipeline.files import write_atomically
from maml_pipeline.learner.tracking.description import Description
from maml_pipeline.learner.tracking.logs import find_wandb_logs, is_empty, is_offline, is_synced
from maml_pipeline.signals import Stopped

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 5
SECONDS_TO_BEGIN = 30
SECONDS_TO_END = 60
"""W&B costs a run no more than these: until it answers at all, until a run has begun, and to end it."""

ID_FILE = "wandb_id.txt"

ID_PATTERN = re.compile(r"[^\s/\\#?%:\x00-\x20]{1,128}")
"""What W&B accepts as a run's id, on one line."""


def read_wandb_id(folder: Path) -> str | None:
    """Return the id of a folder's W&B run; `None` where none is recorded, or what is there is no id."""
    try:
        run_id = (folder / ID_FILE).read_text().strip()
    except (OSError, ValueError):
        return None
    return run_id if ID_PATTERN.fullmatch(run_id) else None


def new_wandb_id(earlier: str | None) -> str:
    """Return an id for a new W&B run: in a sweep the one that its agent gives, otherwise a random one.

    Args:
        earlier: The id of the folder's run that the new one takes the place of.
    """
    settings = _settings()
    given = str(settings.run_id or "") if settings.sweep_id else ""
    return given if ID_PATTERN.fullmatch(given) and given != earlier else secrets.token_hex(4)


def claim_wandb_id(folder: Path, run_id: str) -> None:
    """Keep a W&B run's id in the run's folder, and hold the folder until `finish_tracking`.

    The system releases the folder when this process ends, however it ends.
    """
    if read_wandb_id(folder) != run_id:
        write_atomically(folder / ID_FILE, run_id + "\n")
    # A replaced file is another one to the system: it is locked anew.
    _held.append((folder / ID_FILE).open())
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(_held[-1], fcntl.LOCK_SH)


_held: list[IO[str]] = []
"""The id files of runs of this process, which are locked while they go on."""


def is_run_active(folder: Path) -> bool:
    """Tell whether some process holds a folder; the system lets go for one that was killed."""
    try:
        with (folder / ID_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a log that was copied without its folder, or a file system without locks
        return False
    return False


def choose_wandb_mode(folder: Path) -> str:
    """Return `online`, `offline` or `disabled`: what `WANDB_MODE` says, else online if logged in.

    A run whose earlier part was never uploaded goes on offline, so that its parts arrive in order.
    """
    if WANDB_DISABLED.get():
        return "disabled"
    mode = WANDB_MODE.get() or _settings().mode
    mode = "offline" if mode == "dryrun" else mode
    if mode in ("offline", "disabled"):
        return mode
    if not logged_in():
        if WANDB_MODE.is_set():
            logger.warning("W&B has no API key (`wandb login`): the run is kept offline in %s", folder)
        return "offline"
    waiting = [
        log
        for logs in find_wandb_logs(folder / "wandb").values()
        for log in logs
        if is_offline(log) and not is_synced(log) and not is_empty(log)
    ]
    if waiting:
        logger.warning("W&B: the run goes on offline, as it began; `maml sync %s` uploads it", folder)
        return "offline"
    if not server_answers():
        _warn_offline("no answer", folder)
        return "offline"
    return "online"


def start_wandb_run(
    folder: Path, run_id: str, mode: str, about: Description, config: dict[str, Any]
) -> "wandb.Run":
    """Start a W&B run, or go on with it; offline with a warning where W&B cannot be reached.

    Args:
        folder: The run's folder, in which W&B's files lie.
        run_id: Its id.
        mode: `online` or `offline`.
        about: What it is called and grouped by, unless W&B's environment variables say otherwise.
        config: All that is to be known of it.
    """
    import wandb  # late: it takes a second to import

    settings = _settings()
    if settings.sweep_id:
        # In a sweep W&B ignores the `id` of `init`. A resumed run continues its own run, whichever
        # run the agent has started this process for.
        settings.run_id = run_id
    online = mode == "online"
    try:
        return wandb.init(
            project=settings.project or "maml_pipeline",
            group=settings.run_group or about.group,
            job_type=settings.run_job_type or about.job_type,
            name=settings.run_name or about.name,
            tags=settings.run_tags or about.tags,
            id=run_id,
            # Whole, since W&B's own process may have been started in another working directory.
            dir=folder.absolute(),
            config=config,
            mode="online" if online else "offline",
            resume="allow" if online else None,  # `maml sync` resumes what is written offline
            settings=wandb.Settings(
                silent=not online,
                console="off",
                init_timeout=SECONDS_TO_BEGIN,
                finish_timeout=SECONDS_TO_END,
                finish_timeout_raises=True,
            ),
        )
    except Exception as error:
        if not online:
            raise
        _warn_offline(first_line(error), folder)
        # The session that failed still holds the id.
        wandb.teardown()
        return start_wandb_run(folder, run_id, "offline", about, config)


def finish_tracking() -> None:
    """End the W&B run of this process, where there is one; as failed while an error is raised."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    try:
        if run is not None:
            _finish(run)
    finally:
        while _held:
            _held.pop().close()


def _finish(run: "wandb.Run") -> None:
    error = sys.exc_info()[1]
    try:
        if isinstance(error, Stopped):
            run.mark_preempting()
        run.finish(exit_code=0 if error is None else 1)
    except Exception as trouble:  # a training that is done is done, whatever W&B says
        logger.warning(
            "W&B has not got the whole run (%s); `wandb sync %s` uploads it",
            first_line(trouble),
            Path(run.dir).parent,
        )


def logged_in() -> bool:
    """Tell whether W&B has an API key, in the environment or in the netrc file, without network."""
    if WANDB_API_KEY.is_set():
        return True
    host = urlparse(WANDB_BASE_URL.get()).hostname or ""
    try:
        return netrc.netrc(NETRC.get()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _settings() -> Any:
    """Return W&B's own settings, from the environment and from the files that `wandb init` writes."""
    import wandb

    return wandb.setup().settings


def server_answers() -> bool:
    """Tell whether W&B can be reached, whatever it says: many a compute node has no network."""
    try:
        requests.head(str(_settings().base_url), timeout=SECONDS_TO_ANSWER)
    except requests.RequestException:
        return False
    return True


def _warn_offline(reason: str, folder: Path) -> None:
    logger.warning(
        "W&B cannot be reached (%s): the run is kept offline; `maml sync %s` uploads it later",
        reason,
        folder,
    )


def first_line(error: Exception) -> str:
    """Return what an error says first, or what it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
