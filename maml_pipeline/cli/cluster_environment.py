"""Detect what starts the ranks of a training: Slurm's `srun`, `torchrun`, or Lightning itself."""

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from maml_pipeline import slurm


def cluster_environment() -> list[ClusterEnvironment]:
    """Return Lightning's plugin for what started this process; none where Lightning detects it itself.

    Lightning takes every process with SLURM_NTASKS for one that `srun` started, including a shell of
    `salloc` under a job name other than "bash", and then waits for ranks that never start.
    """
    if TorchElasticEnvironment.detect():
        return []
    if slurm.starts_processes():
        # Lightning's requeueing saves in the middle of a meta-step; StopOnSignal saves between two.
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if slurm.is_shell() else []
