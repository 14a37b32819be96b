"""The results of a run: its own, and whatever else was measured of it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from maml_pipeline.files import write_atomically
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.runs.compatibility import Difference
from maml_pipeline.runs.folder import TEST, VALIDATION

RESULT_FILES = {"test": TEST, "validate": VALIDATION}
"""The file of a run's own result, by command."""


class ResultTable(Callback):
    """Print the result of a test or validation as a table, one row an inner step, and keep it.

    `test.json` and `val.json` hold the run's own result: that of its best state under its own settings.
    Any other measurement has a file of its own, such as `test-1f0c63ab.json`, which says in what it
    differs.

    Args:
        folder: The run's folder; `None` to keep nothing.
        differences: What tells this measurement from the run's own.
    """

    def __init__(self, folder: Path | None, differences: Sequence[Difference] = ()) -> None:
        self.folder = folder
        self.differences = differences
        self._has_trained = False

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove the results of a run that trains on: they are of an earlier state."""
        if self.folder is not None and trainer.is_global_zero and not self._has_trained:
            for file in RESULT_FILES.values():
                (self.folder / file).unlink(missing_ok=True)
        self._has_trained = True

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result over the test tasks."""
        self._show(trainer, pl_module, "test", TEST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result over the validation tasks, unless training goes on after it."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, "val", RESULT_FILES["validate"])

    @rank_zero_only
    def _show(self, trainer: Trainer, learner: LightningModule, split: str, file: str) -> None:
        assert isinstance(learner, MetaLearner)
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        result: dict[str, Any] = {k: v for k, v in metrics.items() if k.startswith(f"{split}/")}
        trained = learner.loaded_meta_step if trainer.ckpt_path else trainer.global_step
        result["meta_step"] = trained

        table = Table(caption=learner.evaluation_protocol())
        table.add_column("inner steps", justify="right")
        for name in learner.measures:
            table.add_column(f"{name} ± 95 % CI", justify="right")
        for step in range(learner.eval_inner.steps + 1):
            cells = (f"{split}/{name}_step_{step}" for name in learner.measures)
            table.add_row(str(step), *(f"{result[c]:.4f} ± {result[f'{c}_ci95']:.4f}" for c in cells))
        console = Console()
        title = f"{split.capitalize()} after {trained} meta-steps, {learner.inner.order} order"
        console.print(title, highlight=False)
        console.print(table)
        if self.folder is not None:
            self._keep(self.folder, file, result)

    def _keep(self, folder: Path, file: str, result: dict[str, Any]) -> None:
        if not self.differences:
            write_atomically(folder / file, json.dumps(result, indent=2) + "\n")
            return
        differing = {key: {"here": here, "run": there} for key, here, there in self.differences}
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
        path = folder / file.replace(".", f"-{digest}.")
        write_atomically(path, json.dumps({**result, "differs": differing}, indent=2) + "\n")
        print(f"Not the run's own result, which is {file}: kept as {path}")
        for key, here, there in self.differences:
            print(f"  {key}: {here} here, {there} in the run")
