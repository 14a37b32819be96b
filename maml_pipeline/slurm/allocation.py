"""What a training requests from Slurm: nodes, GPUs, and one task per device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
"""sbatch flags that follow from the configuration, and the key that sets each."""

AUTO_DEVICES = ("auto", "-1")
CPU, GPU = ("cpu",), ("auto", "gpu", "cuda")


@dataclass(frozen=True)
class Allocation:
    """What a job requests.

    Args:
        nodes: Number of nodes.
        devices: Devices per node, each with one task.
        gpus: GPUs per node in the notation of sbatch: `4`, `a100:4`, or `0`.
        fit_flags: Flags of `maml fit` that fix what its configuration leaves to the machine.
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
        of_node = f"{self.devices} {one if self.devices == 1 else more}"
        return of_node if self.nodes == 1 else f"{self.nodes} nodes with {of_node} each"


def required_allocation(trainer: dict[str, Any], gpus_per_node: str, gpu_type: str) -> Allocation:
    """Return what the `trainer` of a configuration needs.

    Args:
        trainer: That part of the resolved configuration.
        gpus_per_node: GPUs per node for `auto` and -1, as text from cluster.env.
        gpu_type: Type of the GPUs; empty for any.

    Raises:
        UserError: The trainer cannot run in a job, or a value is not a number.
    """
    accelerator, devices = trainer["accelerator"], trainer["devices"]
    if accelerator not in (*CPU, *GPU):
        raise UserError(f"trainer.accelerator is {accelerator}; a job takes cpu or gpu")
    on_cpu = accelerator in CPU
    gpus_by_default = GPUS_PER_NODE.parse(gpus_per_node)
    if str(devices) in AUTO_DEVICES:
        number = 1 if on_cpu else gpus_by_default
    else:
        number = count_devices(devices)
    flags: tuple[str, ...] = () if str(devices) == str(number) else ("--trainer.devices", str(number))
    if accelerator == "auto":
        # If the GPU fails, the job must stop, not fall back to the CPU.
        flags += ("--trainer.accelerator", "gpu")
    gpus = "0" if on_cpu else f"{gpu_type}:{number}" if gpu_type else str(number)
    return Allocation(trainer["num_nodes"], number, gpus, flags)


def count_devices(devices: Any) -> int:
    """Count devices in any notation of Lightning: 2, "2", [0, 1] or "0,1".

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
    """Refuse sbatch flags that could contradict the configuration.

    Args:
        flags: The flags after `--`.
        is_array: Whether the job is an array, whose `--dependency` is set already.

    Raises:
        UserError: A flag follows from the configuration, or is set by `maml submit`.
    """
    if flags and not flags[0].startswith("-"):
        raise UserError(f"{flags[0]} comes after --, where only sbatch flags are allowed")
    for flag, following in pairwise([*flags, ""]):
        name, _, value = flag.partition("=")
        if name not in SET_BY_CONFIG and flag[:1] == "-" and flag[1:2] != "-":
            name = flag[:2]  # -N2
        if key := SET_BY_CONFIG.get(name):
            raise UserError(f"{name} follows from {key}; set that key before the --")
        if name == "--gres" and "gpu" in (value or following):
            raise UserError("--gres follows from trainer.devices; set that key before the --")
        if name in ("--array", "-a") or (is_array and name in ("--dependency", "-d")):
            raise UserError(f"{name} is set by `maml submit --tradeoff`")
