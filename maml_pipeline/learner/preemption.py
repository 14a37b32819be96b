"""Preemption: from a signal to a requeued job, without losing a meta-step.

The sequence, with the place of each step:

1. Slurm sends SIGUSR1 two minutes before the time limit (`#SBATCH --signal` in slurm/*.sbatch), or
   SIGTERM when it preempts the job. It reaches some ranks or all, at any moment. `signals` notes it.
2. After each meta-step, and after its validation if there is one, `LastCheckpoint` asks
   `StopOnSignal.agree_to_stop`. All ranks agree there in one collective operation.
3. If any rank got a signal, `LastCheckpoint` saves the state.
4. Before the next meta-step, `StopOnSignal` raises `Stopped` on every rank.
5. `cli.training` finishes the W&B run, and the ranks leave their process group.
6. `cli.stopping.end_stopped` calls `slurm.requeue` on rank 0. Outside Slurm it prints how to resume.
7. The requeued job finds its run folder by the job's id (`cli.start_or_resume`) and resumes from the
   saved state. In a job of a trade-off, `tradeoff.cells.exec_cell` names the folder and the checkpoint.

Before the first meta-step and during the test, there is no state to save: steps 2 to 4 are skipped.

Step 3 relies on the order of callbacks. Lightning calls those of type `Checkpoint` after all others,
in the order of the list, so `cli.fit_callbacks` ends with `EndEarly`, `BestCheckpoint`,
`LastCheckpoint`: the saved state then includes what every other callback decided in this meta-step.

A process that is killed (by SIGKILL, or for its memory) can do none of this. The shell around it,
slurm/launch.sh, requeues the job then, at most five times because the cause may recur, and the run
resumes from its last periodic checkpoint. A process that ends by itself is requeued in step 6 only.

If a rank ends with an error, `srun` ends the others by SIGTERM. `slurm.requeue` does not take that for a
preemption: the job fails.
"""

import subprocess
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from maml_pipeline import signals
from maml_pipeline.learner import lightning_internals
from maml_pipeline.signals import Response, Stopped

SECONDS_TO_END = 3


class StopOnSignal(Callback):
    """Stop training before the next meta-step after a signal.

    While training runs, a signal is only noted. Lightning's own handler saves a checkpoint immediately,
    which can be in the middle of an update or of a collective operation, and hangs (Lightning#21406).
    Before and after training, a signal stops the run immediately.
    """

    def __init__(self) -> None:
        self._stops = False
        self._trains = False
        self._replaced: signals.Handlers = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from installing its own handlers."""
        lightning_internals.disable_signal_handlers(trainer)
        self._trains = self._trains or stage == "fit"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only note signals from now on."""
        self._replaced = signals.install()
        signals.respond(Response.NOTE, announces=trainer.is_global_zero)
        signals.raise_if_requested()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop immediately from now on: the trained state is saved, and a test can be repeated."""
        meta_steps = trainer.global_step if self._trains else None
        signals.respond(Response.RAISE, meta_steps=meta_steps)
        signals.raise_if_requested()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Stop here if a library has swallowed the exception that the signal raised."""
        signals.raise_if_requested()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers, unless the `maml` command installed ours."""
        signals.restore(self._replaced)
        self._replaced = {}

    def agree_to_stop(self, trainer: Trainer) -> bool:
        """Tell whether training must stop after the current meta-step.

        A collective operation: every rank must call it at the same meta-step. The signal may have
        reached only one rank, or each at another meta-step.
        """
        wants = signals.requested() is not None
        self._stops = trainer.strategy.reduce_boolean_decision(wants, all=False)
        return self._stops

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop where the ranks agreed to: the last meta-step is logged, validated and saved."""
        if self._stops:
            raise Stopped(signals.requested(), trainer.global_step, by_all=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Terminate the ranks that Lightning started if this rank stops without their agreement."""
        signals.restore(self._replaced)
        if isinstance(exception, Stopped) and not exception.by_all:
            _end_ranks(lightning_internals.launched_processes(trainer))


def _end_ranks(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # waiting for this rank in C code
            process.kill()
