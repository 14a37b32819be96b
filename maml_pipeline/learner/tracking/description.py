"""The description of a run in W&B: name, group, job type, tags, and provenance."""

import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from maml_pipeline import slurm
from maml_pipeline.gradient_order import Method
from maml_pipeline.run_config import experiment_name, gradient_order
from maml_pipeline.varied import folder_suffix, varied_settings

PACKAGES = ("maml-pipeline", "torch", "pytorch-lightning", "learn2learn", "numpy", "wandb")
"""Packages whose versions are recorded; W&B records all others in `requirements.txt`."""


@dataclass(frozen=True)
class Description:
    """The fields by which W&B names and groups a run.

    Args:
        group: Such as `omniglot-5w1s-k1`, with the values of varied keys, as in `sine-k1-inner_lr=0.1`;
            runs in a group differ only by order and seed.
        job_type: The gradient order with its method, such as `truncated-2`.
        name: Such as `omniglot-5w1s-second-s0`, with the number of inner steps unless it is 1.
        tags: The engine, the method unless it is `unrolled`, and the number of devices.
    """

    group: str
    job_type: str
    name: str
    tags: tuple[str, ...]


def describe_run(config: dict[str, Any], world_size: int) -> Description:
    """Describe a run to W&B.

    Its name tells the methods of second order apart, which the name of the run's folder does not.

    Args:
        config: The resolved config.
        world_size: Number of devices.
    """
    model, order = config["model"], gradient_order(config)
    steps, setting = model["inner_steps"], folder_suffix(varied_settings(config))
    name = f"{experiment_name(config)}-{order}" + ("" if steps == 1 else f"-k{steps}") + setting
    method = [str(order.method)] if order.method is not Method.UNROLLED else []
    tags = (model["engine"], *method)
    return Description(
        group=f"{experiment_name(config)}-k{steps}{setting}",
        job_type=str(order),
        name=f"{name}-s{config['seed_everything']}",
        tags=(*tags, f"world-size-{world_size}"),
    )


def provenance(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return how a run was made: commit, package versions, device, Slurm job."""
    parts = {
        "git": git_state(Path.cwd()),
        "packages": _versions(),
        "python": platform.python_version(),
        "device": device_name(device),
        "world_size": world_size,
        "slurm": slurm.ids(),
    }
    return {key: value for key, value in parts.items() if value}


def _versions() -> dict[str, str]:
    """Return the versions of `PACKAGES`, without those that are not installed."""
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder, and whether tracked files differ from it.

    Returns:
        `None` if there is no git, repository or commit.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        is_dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": is_dirty}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    # A repository on a network drive can be slow.
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the CPU, such as `AMD EPYC 7B13`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpu_info.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE)
        return named[1] if named else platform.machine()
    return platform.processor() or device.type
