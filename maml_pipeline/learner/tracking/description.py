"""How a run is called, and what it is compared by: its group, order, tags and provenance."""

import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from maml_pipeline import slurm
from maml_pipeline.meta_gradient.order import Method

PACKAGES = ("maml-pipeline", "torch", "pytorch-lightning", "learn2learn", "numpy", "wandb")
"""Packages that a result depends on; W&B keeps the versions of all others in `requirements.txt`."""


def gradient_method(config: dict[str, Any]) -> Method:
    """Return how a resolved config computes its meta-gradients."""
    return Method.of(config["model"]["first_order"], config["model"]["checkpoint_inner_steps"])


@dataclass(frozen=True)
class Description:
    """What W&B groups and names a run by.

    Args:
        group: The experiment: runs in it differ by order and seed alone, such as `omniglot-5w1s-k1`.
        job_type: The gradient order.
        name: Such as `omniglot-5w1s-second-s0`, with the inner steps where they are not one.
        tags: Engine, `checkpointed`, `compiled` and the number of devices.
    """

    group: str
    job_type: str
    name: str
    tags: tuple[str, ...]


def describe(config: dict[str, Any], world_size: int) -> Description:
    """Describe a run.

    Args:
        config: Its whole resolved config.
        world_size: Devices that train it.
    """
    model, method = config["model"], gradient_method(config)
    steps = model["inner_steps"]
    name = f"{experiment_name(config)}-{method}" + ("" if steps == 1 else f"-k{steps}")
    flags = {"checkpointed": method is Method.CHECKPOINTED, "compiled": model["compile"]}
    tags = (model["engine"], *(tag for tag, holds in flags.items() if holds))
    return Description(
        group=f"{experiment_name(config)}-k{steps}",
        job_type=str(method),
        name=f"{name}-s{config['seed_everything']}",
        tags=(*tags, f"world-size-{world_size}"),
    )


def experiment_name(config: dict[str, Any]) -> str:
    """Return the name of what a resolved config trains; that of its tasks where it has none."""
    name = config["run"]["experiment"]
    if name is None:
        name = str(config["data"]["tasks"]["class_path"]).rpartition(".")[2].lower()
    return str(name)


def provenance(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what a run was made with and where: code, packages, device and Slurm's job."""
    parts = {
        "git": git_state(Path.cwd()),
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": _device_name(device),
        "world_size": world_size,
        "slurm": slurm.ids(),
    }
    return {key: value for key, value in parts.items() if value}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that a folder is at, and whether tracked files differ from it.

    Returns:
        `None` where there is no git, no repository, or no commit.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        is_dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": is_dirty}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    # A repository on a network drive may take its time; a training does not wait for it.
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if device.type == "cpu" and cpu_info.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE)
        return named[1] if named else platform.machine()
    return platform.processor() or device.type
