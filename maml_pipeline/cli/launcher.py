"""What starts the processes of a training: Slurm's `srun`, `torchrun`, or Lightning itself."""

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from maml_pipeline import slurm


def cluster_environment() -> list[ClusterEnvironment]:
    """Return Lightning's plugin for what started this process; none where Lightning finds out itself.

    It takes every process with SLURM_NTASKS for one that `srun` started, also a shell that `salloc`
    opened under another name than "bash", and then waits for ranks that nobody starts.
    """
    if TorchElasticEnvironment.detect():
        return []
    if slurm.starts_processes():
        # Lightning's own requeueing saves in the middle of a meta-step: see StopOnSignal.
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if slurm.is_shell() else []
