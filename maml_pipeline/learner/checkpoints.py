"""Checkpoints of a run: the best state, and the last state, from which it resumes."""

import errno
import os
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint

from maml_pipeline.checksum import add_checksum, has_valid_checksum, has_valid_members
from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically
from maml_pipeline.learner import lightning_internals
from maml_pipeline.learner.preemption import StopOnSignal

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
"""Keys that hold a path in the state of Lightning's `ModelCheckpoint`, besides `best_k_models`."""
REMEDY = "use another checkpoint, such as the run's best.ckpt or last.ckpt, or start a new run"


class BestCheckpoint(ModelCheckpoint):
    """Save the state with the best validation result.

    Args:
        path: Path of the checkpoint, ending in `.ckpt`; that of rank 0 counts.
        monitor: The logged metric that selects the best state.
        mode: Whether its smallest or largest value is the best.
    """

    def __init__(self, path: Path, monitor: str, mode: Literal["min", "max"]) -> None:
        self._name = path.name
        super().__init__(
            path.parent,
            filename=path.stem,
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            # Save after validation, before LastCheckpoint, which saves the result of this decision.
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let rank 0 check whether the run has a best state, so that all ranks agree."""
        super().setup(trainer, pl_module, stage)
        self._has_best = trainer.strategy.broadcast(Path(str(self.dirpath), self._name).exists())

    # It saves after validations alone: no hook to call in every batch.
    on_train_batch_end = Callback.on_train_batch_end

    def state_dict(self) -> dict[str, Any]:
        """Store file names without folders, since a run folder may be moved."""
        state = super().state_dict()
        for key in PATHS:
            state[key] = Path(state[key]).name if state[key] else ""
        state["best_k_models"] = {Path(path).name: score for path, score in self.best_k_models.items()}
        return state | {"dirpath": ""}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Find the files in this run's folder; start without a best state if the run has none.

        The run has none if the checkpoint is another run's.
        """
        if not self._has_best:
            return
        state = {**state_dict, "dirpath": self.dirpath}
        for key in PATHS:
            state[key] = self._own(state[key]) if state[key] else ""
        scores = state["best_k_models"].items()
        state["best_k_models"] = {self._own(path): score for path, score in scores}
        super().load_state_dict(state)
        # Lightning does not restore the score, but a resumed run saves it again.
        self.current_score = state_dict["current_score"]

    def _own(self, path: str) -> str:
        return str(Path(str(self.dirpath), Path(path).name))


class LastCheckpoint(Checkpoint):
    """Save the current state every n meta-steps, at the end of training, and before a stop.

    States are saved between two meta-steps. If a validation follows a meta-step, the state is saved
    after it, including its result for the best checkpoint. Lightning's callback saves the state before
    the validation, which a resumed run would then skip.

    Args:
        path: Path of the checkpoint; that of rank 0 counts.
        every: Meta-steps between two saves.
        stop: Tells at the end of each meta-step whether training stops there.
    """

    def __init__(self, path: Path, every: int, stop: StopOnSignal) -> None:
        self.path = path
        self.every = every
        self.stop = stop
        self._ended_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the path of rank 0 on all ranks."""
        self.path = trainer.strategy.broadcast(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the meta-step at which training starts."""
        self._ended_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """End the meta-step, unless its validation follows."""
        if not lightning_internals.validates_next(trainer):
            self._end_meta_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the meta-step after its validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._end_meta_step(trainer)

    def _end_meta_step(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._ended_at or lightning_internals.is_within_meta_step(trainer):
            return
        self._ended_at = step
        stops = self.stop.agree_to_stop(trainer)
        ends = trainer.should_stop or step == trainer.max_steps or _ends_last_epoch(trainer)
        if stops or ends or step % self.every == 0:
            trainer.save_checkpoint(self.path, weights_only=False)


def _ends_last_epoch(trainer: Trainer) -> bool:
    """Tell whether `max_epochs` ends training here."""
    is_last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return is_last_epoch and lightning_internals.ends_epoch(trainer)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and with a checksum, which is verified on reading.

    Lightning writes to the system's temporary folder and copies from there, which is not atomic between
    file systems.

    Args:
        run: The folder of the run, which is not created again if it was deleted; `None` without one.
    """

    def __init__(self, run: Path | None = None) -> None:
        super().__init__()
        self.run = None if run is None else run.absolute()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save a state, replacing an existing file atomically."""
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        folder = Path(path).absolute().parent
        run = self.run
        if run is not None and folder.is_relative_to(run) and not run.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        folder.mkdir(exist_ok=True, parents=True)
        write_atomically(Path(path), add_checksum(buffer.getvalue()))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a state to the CPU."""
        return load_checkpoint(path)


def load_checkpoint(path: str | Path, resumes: bool = False) -> dict[str, Any]:
    """Read a checkpoint that is complete and undamaged, without running code from it.

    Args:
        path: A file written by this program. If only its parameters are needed, also one written by a
            plain Lightning `Trainer`, which has no checksum but the CRC-32 of its parts.
        resumes: Whether training resumes from it, which requires the whole state.

    Raises:
        UserError: It is not a checkpoint of this program, or it is damaged.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"ckpt_path {path} cannot be read ({error.strerror})") from error
    is_own = has_valid_checksum(content)
    if not is_own and not has_valid_members(content):
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program, or is damaged; {REMEDY}")
    if resumes and not is_own:
        raise UserError(f"ckpt_path {path} was not written by maml fit and cannot be resumed; {REMEDY}")
    try:
        checkpoint: Any = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes may raise anything
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program; {REMEDY}") from error
    wrong = _wrong_part(checkpoint)
    if wrong is not None:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program: {wrong}; {REMEDY}")
    return dict(checkpoint)


def _wrong_part(checkpoint: Any) -> str | None:
    """Describe the first part that is missing or has a wrong type; `None` if there is none."""
    if not isinstance(checkpoint, dict):
        return f"it holds a {type(checkpoint).__name__}, not a dict"
    parts = {"state_dict": dict, "global_step": int, "pytorch-lightning_version": str}
    for name, kind in parts.items():
        if not isinstance(checkpoint.get(name), kind):
            return f"it has no {name} of type {kind.__name__}"
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(name, str):
            return f"{name!r} in its state_dict is a {type(name).__name__}, not a parameter's name"
        if not isinstance(value, torch.Tensor):
            return f"{name} in its state_dict is a {type(value).__name__}, not a tensor"
    return None
