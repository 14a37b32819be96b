"""The id of a run's W&B run: chosen once, kept in a file, and locked while the run is active."""

import contextlib
import os
import re
import secrets
from pathlib import Path

from maml_pipeline.files import write_atomically
from maml_pipeline.learner.tracking.wandb_internals import global_settings
from maml_pipeline.locks import LocksUnsupportedError, acquire_lock

ID_PATTERN = re.compile(r"[^\s/\\#?%:\x00-\x20]{1,128}")
"""Ids that W&B accepts, on one line."""


def read_wandb_id(id_file: Path) -> str | None:
    """Return the id in a file; `None` if the file is missing or does not hold a valid id."""
    try:
        run_id = id_file.read_text().strip()
    except (OSError, ValueError):
        return None
    return run_id if ID_PATTERN.fullmatch(run_id) else None


def new_wandb_id(earlier: str | None) -> str:
    """Return an id for a new W&B run: in a sweep the one that its agent gives, otherwise a random one.

    Args:
        earlier: The id that the new one replaces; it is not returned again.
    """
    settings = global_settings()
    given = str(settings.run_id or "") if settings.sweep_id else ""
    return given if ID_PATTERN.fullmatch(given) and given != earlier else secrets.token_hex(4)


def claim_wandb_id(id_file: Path, run_id: str) -> None:
    """Write an id to its file, and lock the file until `release_wandb_ids` or the end of the process.

    `maml sync` skips a run with a locked id file (`is_locked`): the run is still active.
    """
    if read_wandb_id(id_file) != run_id:
        write_atomically(id_file, run_id + "\n")
    with contextlib.suppress(LocksUnsupportedError):
        # Shared: a worker process of a killed run may still hold its lock. Waiting: `is_locked` takes an
        # exclusive lock for a moment.
        _descriptors.append(acquire_lock(id_file, shared=True, wait=True))


def release_wandb_ids() -> None:
    """Release every id file that this process has locked."""
    while _descriptors:
        os.close(_descriptors.pop())


_descriptors: list[int] = []
"""Locked id files. A replaced file has its own lock, so one run may have several."""
