"""Where metrics go: a table in the run's folder, and W&B."""

import json
import netrc
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.errors import UserError
from maml_pipeline.learner.metrics_csv import MetricsCSV

if TYPE_CHECKING:
    import wandb


def run_loggers(folder: Path, name: str, config: dict[str, Any]) -> list[Logger]:
    """Build a run's loggers: `metrics.csv` and W&B, offline unless the person is logged in.

    Args:
        folder: The run's folder; W&B's files lie in it too.
        name: The run's name.
        config: The whole resolved config, for W&B.
    """
    loggers: list[Logger] = [MetricsCSV(folder)]
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        loggers.append(WandbLogger(experiment=start_wandb(folder, name, config)))
    return loggers


def start_wandb(folder: Path, name: str, config: dict[str, Any]) -> "wandb.Run":
    """Start the W&B run of a folder, or go on with it under its id.

    `WANDB_MODE` and the other variables of W&B are respected.
    """
    import wandb  # late: it takes a second to import

    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4) + "\n")
    mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    online = mode == "online"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "maml_pipeline"),
        name=name,
        id=id_file.read_text().strip(),
        dir=folder,
        config=config,
        mode=mode,  # type: ignore[arg-type]  # W&B itself checks what a person wrote there
        resume="allow" if online else None,
        settings=wandb.Settings(silent=not online, console="off"),
    )
    run.define_metric("*", step_metric="trainer/global_step")
    return run


def finish_tracking() -> None:
    """End the W&B run of this process, where there is one."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def wandb_logs(folder: Path) -> dict[str, list[Path]]:
    """Return W&B's logs in or below a folder by run, those of a resumed run in order."""
    logs: dict[str, list[Path]] = {}
    for log in sorted({path.resolve() for path in folder.rglob("run-*.wandb")}):
        # .../wandb/offline-run-20261124_030330-f76e1feb/run-f76e1feb.wandb: sorted is by time.
        logs.setdefault(str(log.parent.parent / log.stem), []).append(log)
    return logs


def read_wandb_log(log: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Read a W&B run that was never uploaded, also one that still goes on.

    Args:
        log: Its `run-<id>.wandb`.

    Returns:
        The config, and what was logged with the meta-step under `step`, in order.

    Raises:
        UserError: W&B's own reader cannot read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{log} cannot be read: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
    config: dict[str, Any] = {}
    history = []
    for record in map(json.loads, done.stdout.splitlines()):
        if record["type"] == "run":
            config = record["run"]["config"]["update"]
        elif record["type"] == "history":
            item = record["history"]["item"]
            if "trainer/global_step" in item:
                logged = {k: v for k, v in item.items() if k[0] != "_" and not isinstance(v, str)}
                history.append({**logged, "step": logged.pop("trainer/global_step")})
    return config, history


def logged_in() -> bool:
    """Tell whether W&B has an API key, in the environment or in the netrc file, without network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
