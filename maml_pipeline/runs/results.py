"""Printing and saving the results of a run's tests and validations."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from maml_pipeline.files import write_atomically
from maml_pipeline.learner.meta_learner import MetaLearner
from maml_pipeline.run_folder import TEST, VALIDATION
from maml_pipeline.runs.compatibility import Difference
from maml_pipeline.tasks import TaskBatch
from maml_pipeline.text import in_one_notation

RESULT_FILES = {"test": TEST, "validate": VALIDATION}
"""The file with a run's own result, by command."""

PROTOCOLS = {
    True: "transductive: each query set is predicted as one batch",
    False: "not transductive: each query point is predicted by itself, with the support set",
}
"""Descriptions of `model.transductive`, printed below a result that depends on it."""


class ResultTable(Callback):
    """Print the result of a test or validation as a table with one row per inner step, and save it.

    `test.json` and `val.json` hold the run's own result, of its best checkpoint with its own settings.
    Any other result is saved to a separate file, such as `test-1f0c63ab.json`, with the settings that
    differ.

    Args:
        folder: The run's folder; `None` to save nothing.
        differences: The settings of this evaluation that differ from the run's own.
    """

    def __init__(self, folder: Path | None, differences: Sequence[Difference] = ()) -> None:
        self.folder = folder
        self.differences = differences
        self._has_trained = False
        self._points_interact: bool | None = None

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove the results of a run that resumes training, since they are of an earlier state."""
        if self.folder is not None and trainer.is_global_zero and not self._has_trained:
            for file in RESULT_FILES.values():
                (self.folder / file).unlink(missing_ok=True)
        self._has_trained = True

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Find out, once, whether predictions of query points depend on each other."""
        self._check_interaction(pl_module, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Find out the same before a validation outside training."""
        if trainer.state.fn == "validate":
            self._check_interaction(pl_module, batch)

    @rank_zero_only
    def _check_interaction(self, learner: LightningModule, batch: TaskBatch) -> None:
        assert isinstance(learner, MetaLearner)
        # With fewer tasks than devices, a device has none.
        if self._points_interact is None and len(batch.query_x):
            task = (batch.query_x[0], batch.support_x[0])
            self._points_interact = points_interact(learner.network, *task)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and save the result on the test tasks."""
        self._show(trainer, pl_module, "test", TEST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and save the result on the validation tasks, outside training."""
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, "val", RESULT_FILES["validate"])

    @rank_zero_only
    def _show(self, trainer: Trainer, learner: LightningModule, split: str, file: str) -> None:
        assert isinstance(learner, MetaLearner)
        metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
        result: dict[str, Any] = {k: v for k, v in metrics.items() if k.startswith(f"{split}/")}
        result["meta_step"] = learner.loaded_meta_step if trainer.ckpt_path else trainer.global_step

        table = Table(caption=PROTOCOLS[learner.transductive] if self._points_interact else None)
        table.add_column("inner steps", justify="right")
        for name in learner.measures:
            table.add_column(f"{name} ± 95 % CI", justify="right", overflow="fold")
        for step in range(learner.eval_inner.steps + 1):
            cells = (f"{split}/{name}_step_{step}" for name in learner.measures)
            numbers = (in_one_notation(result[cell], result[f"{cell}_ci95"]) for cell in cells)
            table.add_row(str(step), *(f"{mean} ± {margin}" for mean, margin in numbers))
        console = Console()
        name = {"test": "Test", "val": "Validation"}[split]
        title = f"{name} of {_evaluated_state(trainer, learner)}"
        console.print(title, highlight=False, markup=False, emoji=False)
        console.print(table)
        if self.folder is not None:
            self._save(self.folder, file, result)

    def _save(self, folder: Path, file: str, result: dict[str, Any]) -> None:
        if not self.differences:
            write_atomically(folder / file, json.dumps(result, indent=2) + "\n")
            return
        differing = {key: {"here": here, "run": there} for key, here, there in self.differences}
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
        path = folder / file.replace(".", f"-{digest}.")
        write_atomically(path, json.dumps({**result, "differs": differing}, indent=2) + "\n")
        print(f"Settings differ from the run's; saved to {path} ({file} is unchanged):")
        for key, here, there in self.differences:
            print(f"  {key}: {here} here, {there} in the run")


def _evaluated_state(trainer: Trainer, learner: MetaLearner) -> str:
    """Describe the evaluated parameters: `best.ckpt, from meta-step 300 of 500, second order`."""
    if trainer.ckpt_path:
        state, step = Path(trainer.ckpt_path).name, learner.loaded_meta_step
    else:
        state, step = "the final parameters", trainer.global_step
        if step == 0:
            return "the initial parameters"
    end = f" of {trainer.max_steps:,}" if trainer.max_steps >= step else ""
    return f"{state}, from meta-step {step:,}{end}, {learner.inner.order.phrase}"


def points_interact(network: nn.Module, query_x: Tensor, support_x: Tensor) -> bool:
    """Tell whether the prediction of a query point depends on the other points in its batch.

    It does if the network normalises by batch statistics.

    Args:
        network: The network, in evaluation mode.
        query_x: The inputs of one task's query set, `(Q, ...)`.
        support_x: The inputs of the same task's support set, `(S, ...)`.
    """
    with torch.no_grad(), torch.random.fork_rng([query_x.device] if query_x.is_cuda else []):
        alone = network(query_x)
        together = network(torch.cat([query_x, support_x[:1]]))[: len(query_x)]
    return not torch.allclose(alone, together, rtol=1e-3, atol=1e-5, equal_nan=True)
