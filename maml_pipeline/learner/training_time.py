"""How long a run has trained, over all the times that it was started."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class TrainingTime(Callback):
    """Measure the time of training, including validations, and save it in checkpoints.

    A run that resumes continues from the time in its checkpoint, so the meta-steps that a kill has cost
    do not count.
    """

    def __init__(self) -> None:
        self.starts = 0
        """How often the run was started, the current time included."""
        self.is_complete = True
        """Whether every start is counted; an older version saved no time in its checkpoints."""
        self.has_trained = False
        """Whether this start has trained a meta-step; none is left if the run had ended."""
        self._first_meta_step = 0
        self._loads = True
        self._before = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """The time of training so far."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load no state for a test: Lightning loads that of the tested checkpoint."""
        self._loads = stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start measuring; the state of a resumed run is loaded."""
        self.is_complete = self.starts > 0 or trainer.global_step == 0
        self.starts += 1
        self._first_meta_step = trainer.global_step
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop measuring."""
        self._before, self._began = self.seconds, None
        self.has_trained = trainer.global_step > self._first_meta_step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves."""
        return {"seconds": self.seconds, "starts": self.starts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the time of the checkpoint with which training resumes."""
        if self._loads:
            self._before, self.starts = float(state_dict["seconds"]), int(state_dict["starts"])
