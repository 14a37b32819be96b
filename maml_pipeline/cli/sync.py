"""`maml sync`: upload offline runs with `wandb sync`."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.environment import child_environment
from maml_pipeline.errors import UserError
from maml_pipeline.locks import is_locked
from maml_pipeline.run_folder import WANDB_ID
from maml_pipeline.text import printable


def run(arguments: Sequence[str]) -> None:
    """Upload the logs that are not uploaded yet, those of a resumed run in order.

    Args:
        arguments: Those after `maml sync`.

    Raises:
        UserError: A path holds no W&B run, there is no API key, or W&B fails to upload a log.
    """
    parser = Parser(
        prog="maml sync",
        description="Upload offline runs to W&B. Runs that are already uploaded are skipped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN_DIR",
        nargs="+",
        type=path_argument,
        help="a run's folder, or a folder that contains runs",
    )
    add("--entity", metavar="NAME", help="team or user (default: yours)")
    add("--project", metavar="NAME", help="project (default: the project set when the run was logged)")
    settings = parser.parse_args(arguments)
    # Imported late: Lightning takes seconds to import, which help must not.
    from maml_pipeline.learner.tracking import logged_in

    rounds = _rounds(settings.runs)
    if not rounds:
        print("Nothing to upload: every run is already uploaded, or was online")
        return
    if not logged_in():
        raise UserError("W&B has no API key here; run `wandb login`, or set WANDB_API_KEY")
    options = [f"--{key}={value}" for key in ("entity", "project") if (value := getattr(settings, key))]
    for number, logs in enumerate(rounds):
        _upload(logs, options, resumes=number > 0)
    print(f"Runs uploaded: {len({log.stem for log in chain(*rounds)})}")


def _rounds(paths: Sequence[Path]) -> list[list[Path]]:
    """Return the logs to upload: first the first log of every run, then every second log, and so on."""
    from maml_pipeline.learner.tracking.logs import find_wandb_logs
    from maml_pipeline.learner.tracking.wandb_internals import is_empty, is_offline, is_synced

    runs: dict[str, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} does not exist; give a run's folder, or a folder that contains runs"
            )
        found = find_wandb_logs(path)
        if not found:
            raise UserError(
                f"{path} holds no W&B run; give a run's folder, or a folder that contains runs"
            )
        runs |= found
    waiting: list[list[Path | None]] = []
    for logs in runs.values():
        folder = logs[0].parent.parent.parent
        if is_locked(folder / WANDB_ID):
            print(f"{printable(folder)} is still being trained: upload it later")
            continue
        logs = [log for log in logs if not is_empty(log)]
        # An uploaded log keeps its place: only the first log of a run creates it on the server.
        waiting.append([None if is_synced(log) or not is_offline(log) else log for log in logs])
    rounds = [[log for log in part if log is not None] for part in zip_longest(*waiting)]
    while rounds and not rounds[-1]:
        rounds.pop()
    return rounds


def _upload(logs: Sequence[Path], options: Sequence[str], resumes: bool) -> None:
    if not logs:
        return
    from maml_pipeline.learner.tracking.wandb_internals import is_synced

    command = [sys.executable, "-m", "wandb", "sync", *options, *(str(log.parent) for log in logs)]
    # W&B asks the server for the last step and continues from it (compare wandb#5865).
    environment = child_environment(WANDB_RESUME="allow") if resumes else None
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    failed = next((log for log in logs if not is_synced(log)), None)
    if failed is not None or done.returncode:
        lines = [line.removeprefix("wandb: ").strip() for line in done.stderr.splitlines()]
        words = [line for line in lines if line] or ["no reason given"]
        reason = next((line for line in reversed(words) if "ERROR" in line), words[-1])
        raise UserError(f"{(failed or logs[0]).parent} was not uploaded: {reason}")
