"""The nodes, tasks and GPUs that a run requests from Slurm, derived from its configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maml_pipeline.environment import GPUS_PER_NODE
from maml_pipeline.errors import UserError

SET_BY_CONFIG = {
    "--nodes": "trainer.num_nodes",
    "-N": "trainer.num_nodes",
    **dict.fromkeys(
        (
            *("--ntasks", "-n", "--ntasks-per-node", "--ntasks-per-gpu", "--tasks-per-node"),
            *("--gpus", "-G", "--gpus-per-node", "--gpus-per-task"),
        ),
        "trainer.devices",
    ),
}
"""Flags of sbatch that follow from the configuration, each with the key that determines it."""

AUTO_DEVICES = ("auto", "-1")
CPU, GPU = ("cpu",), ("auto", "gpu", "cuda")


@dataclass(frozen=True)
class Allocation:
    """The nodes and devices that a job requests.

    Args:
        nodes: Number of nodes.
        devices: Number of devices per node, each with one task.
        gpus: GPUs per node in the syntax of sbatch: `4`, `a100:4`, or `0`.
        fit_flags: Flags for `maml fit` that replace `auto` in its configuration.
    """

    nodes: int
    devices: int
    gpus: str
    fit_flags: tuple[str, ...] = ()

    @property
    def sbatch_flags(self) -> list[str]:
        return [
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.devices}",
            f"--gpus-per-node={self.gpus}",
        ]

    def __str__(self) -> str:
        one, more = ("CPU process", "CPU processes") if self.gpus == "0" else ("GPU", "GPUs")
        per_node = f"{self.devices} {one if self.devices == 1 else more}"
        return per_node if self.nodes == 1 else f"{self.nodes} nodes with {per_node} each"


def allocation(trainer: dict[str, Any], gpus_per_node: str, gpu_type: str) -> Allocation:
    """Derive the allocation from the `trainer` section of a configuration.

    Args:
        trainer: That section of the resolved configuration.
        gpus_per_node: Number of GPUs per node for `devices` `auto` or -1, as text.
        gpu_type: Type of GPU; empty for any.

    Raises:
        UserError: The section cannot run in a job, or a value is not a number.
    """
    accelerator, devices = trainer["accelerator"], trainer["devices"]
    if accelerator not in (*CPU, *GPU):
        raise UserError(f"trainer.accelerator is {accelerator}; in a job it must be cpu or gpu")
    on_cpu = accelerator in CPU
    gpus_by_default = GPUS_PER_NODE.parse(gpus_per_node)
    if str(devices) in AUTO_DEVICES:
        number = 1 if on_cpu else gpus_by_default
    else:
        number = count_devices(devices)
    flags: tuple[str, ...] = () if str(devices) == str(number) else ("--trainer.devices", str(number))
    if accelerator == "auto":
        # If a GPU fails, the job must stop instead of training on a CPU.
        flags += ("--trainer.accelerator", "gpu")
    gpus = "0" if on_cpu else f"{gpu_type}:{number}" if gpu_type else str(number)
    return Allocation(trainer["num_nodes"], number, gpus, flags)


def count_devices(devices: Any) -> int:
    """Count devices in any form that Lightning accepts: 2, "2", [0, 1] or "0,1".

    Raises:
        UserError: The value has none of these forms.
    """
    if isinstance(devices, list) and devices:
        return len(devices)
    text = str(devices)
    count = str(len([part for part in text.split(",") if part])) if "," in text else text
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"trainer.devices is {devices}; give the number of devices per node")
    return int(count)


def check_sbatch_flags(flags: Sequence[str], is_array: bool) -> None:
    """Reject flags of sbatch that could contradict the configuration.

    Args:
        flags: The flags as typed.
        is_array: Whether `maml submit` sets `--array` and `--dependency`.

    Raises:
        UserError: A flag is rejected; the message names the key to set instead.
    """
    if flags and not flags[0].startswith("-"):
        raise UserError(f"{flags[0]} is not a flag of sbatch, which is all that may follow --")
    for flag in flags:
        name = flag.partition("=")[0]
        if name not in SET_BY_CONFIG and flag[:1] == "-" and flag[1:2] != "-":
            name = flag[:2]  # -N2
        if key := SET_BY_CONFIG.get(name):
            raise UserError(f"{name} follows from {key}; set that key before the --")
        if name == "--gres" and "gpu" in flag:
            raise UserError("--gres follows from trainer.devices; set that key before the --")
        if name in ("--array", "-a") or (is_array and name in ("--dependency", "-d")):
            raise UserError(f"{name} is set by `maml submit --tradeoff`; leave it out")
