"""The callbacks of `maml fit`."""

from pathlib import Path
from typing import NamedTuple

from pytorch_lightning import Callback

from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint
from maml_pipeline.learner.early_stopping import EndEarly
from maml_pipeline.learner.lightning_internals import skip_empty_hooks
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress_bar import MetaStepProgressBar
from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from maml_pipeline.learner.tracking import StartTracking
from maml_pipeline.learner.training_time import TrainingTime
from maml_pipeline.run_folder import BEST_CHECKPOINT, LAST_CHECKPOINT, RunSettings
from maml_pipeline.runs.results import ResultTable


class FitCallbacks(NamedTuple):
    """The callbacks of a training, and those of them that are read after it."""

    ordered: list[Callback]
    best: BestCheckpoint
    time: TrainingTime


def fit_callbacks(
    folder: Path,
    run: RunSettings,
    probes: ProbeSettings,
    seed: int,
    results: ResultTable,
    shows_progress: bool,
) -> FitCallbacks:
    """Build the callbacks of a training, in the order in which Lightning calls them.

    Those of the user come before. The last three are of type `Checkpoint`, which Lightning calls after
    all others: the saved state includes what every other callback decided in this meta-step.

    Args:
        folder: The run's folder; rank 0 writes its checkpoints there.
        run: When to save, and what is the best state.
        probes: What to measure.
        seed: Seed of the random numbers of the network.
        results: Prints and saves the result of the test.
        shows_progress: Whether to draw a progress bar.
    """
    stop, time = StopOnSignal(), TrainingTime()
    best = BestCheckpoint(folder / BEST_CHECKPOINT, run.monitor, run.mode)
    last = LastCheckpoint(folder / LAST_CHECKPOINT, run.checkpoint_every, stop)
    ordered: list[Callback] = [
        stop,
        SeedRandomNumbers(seed),
        DropRepeatedRows(),
        StartTracking(folder / BEST_CHECKPOINT),
        *probes.callbacks(),
        time,
        *([MetaStepProgressBar()] if shows_progress else []),
        results,
        EndEarly(),
        best,
        last,
    ]
    skip_empty_hooks(ordered)
    return FitCallbacks(ordered, best, time)
