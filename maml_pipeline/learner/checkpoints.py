"""Which states of a run are kept: the best one, and the last one to go on from."""

from pathlib import Path
from typing import Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keep the state with the best validation result as `best.ckpt`.

    Args:
        folder: Where to keep it.
        monitor: The logged metric that decides.
        mode: Whether its best value is the smallest or the largest.
    """

    def __init__(self, folder: Path, monitor: str, mode: Literal["min", "max"]) -> None:
        super().__init__(
            folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False
        )


class LastCheckpoint(ModelCheckpoint):
    """Keep the newest state as `last.ckpt`, every n meta-steps and at the end of training.

    Lightning's own `save_last` saves only when the best checkpoint changes.

    Args:
        folder: Where to keep it.
        every: Meta-steps between two savings.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            folder, filename="last", every_n_train_steps=every, enable_version_counter=False
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state, which the last multiple of `every` may have missed."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
