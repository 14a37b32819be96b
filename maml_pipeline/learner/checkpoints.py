"""Which states of a run are kept: the best one, and the last one to go on from."""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically
from maml_pipeline.learner.preemption import StopOnSignal


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the latest score too, which Lightning leaves out: a resumed run saves it again."""
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]


class LastCheckpoint(Checkpoint):
    """Keep the newest state as `last.ckpt`: every n meta-steps, at the end, and before a stop.

    A state is that between two meta-steps. Where a validation belongs to the meta-step, the state is
    kept after it, with what it decided about the best checkpoint; Lightning's own callback keeps it
    before, and a resumed run would never validate there.

    Args:
        folder: Where to keep it; that of rank 0 counts.
        every: Meta-steps between two savings.
        stop: Asked at the end of each meta-step whether it is the last one for now.
    """

    def __init__(self, folder: Path, every: int, stop: StopOnSignal) -> None:
        self.folder = folder
        self.every = every
        self.stop = stop
        self._asked_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder."""
        self.folder = trainer.strategy.broadcast(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the meta-step that training starts from."""
        self._asked_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End the meta-step, unless its validation is still to come."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        # Lightning's own rule, since whoever asks must get the answer that it acts on.
        if fetcher is not None and not loop._should_check_val_fx(fetcher):
            self._end_meta_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the meta-step that was validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_meta_step(trainer)

    def _end_meta_step(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._asked_at or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._asked_at = step
        stops = self.stop.is_wanted(trainer)
        if stops or trainer.should_stop or step == trainer.max_steps or step % self.every == 0:
            trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)


class WholeCheckpointIO(TorchCheckpointIO):
    """Write checkpoints so that a kill while one is saved leaves the one before as it was.

    Lightning writes to the system's folder for temporary files first; from there to another file
    system, it is copied bit by bit.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a state in a file of its own, and let it take the place of the one before at once."""
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(exist_ok=True)  # and not a run folder that was deleted
        write_atomically(Path(path), buffer.getvalue())


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, and nothing in it that could run code.

    Raises:
        UserError: It is no checkpoint of this program, or damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program, or damaged") from error
    if "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program: no state_dict in it")
    return checkpoint
