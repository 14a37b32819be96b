"""`maml fit | validate | test`: the lifecycle of a run, from its settings to its artifacts.

LightningCLI calls the steps of a command from its constructor, in this order:

1. `cli.training_parser` parses the arguments and builds the network, the tasks and the callbacks.
2. `instantiate_trainer` finds the run to start, resume or evaluate, and checks every setting
   (`locate_and_check`); creates or reopens its folder and locks it (`_open_folder`); builds the trainer.
3. Lightning trains, validates or tests; `learner.preemption` tells what a signal does meanwhile.
4. `after_fit` tests the best checkpoint, attaches the artifacts and tells what to type next.
"""

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer

from maml_pipeline import run_folder, signals, slurm
from maml_pipeline.cli import faults, training_help
from maml_pipeline.cli.artifacts import attach_artifacts
from maml_pipeline.cli.checked_command import CheckedCommand
from maml_pipeline.cli.checkpoint_to_evaluate import newest_trained_run
from maml_pipeline.cli.checks.callbacks import as_list
from maml_pipeline.cli.cluster_environment import cluster_environment
from maml_pipeline.cli.end_of_fit import print_end
from maml_pipeline.cli.fit_callbacks import fit_callbacks
from maml_pipeline.cli.start_or_resume import check_free, resume_command
from maml_pipeline.cli.stopping import leave_process_group
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.environment import NVML_CUDA_CHECK, OFFLINE, RUN_DIR
from maml_pipeline.errors import UserError
from maml_pipeline.files import remove_unfinished, write_atomically
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO
from maml_pipeline.learner.lightning_internals import align_logged_step
from maml_pipeline.learner.no_profiler import NoProfiler
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress_bar import MetaStepProgressBar
from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from maml_pipeline.learner.tracking import finish_tracking
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.runs.locked_folder import open_run_folder
from maml_pipeline.runs.loggers import run_loggers
from maml_pipeline.runs.results import ResultTable
from maml_pipeline.runs.submitted_folder import check_no_active_job
from maml_pipeline.signals import Stopped
from maml_pipeline.text import printable

NO_FOLDER = Path(os.devnull)


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        command: `fit`, `validate` or `test`.
        arguments: The arguments after it.

    Raises:
        UserError: A setting is invalid.
    """
    if training_help.asks_for_all(arguments):
        arguments = ["--help"]
    configure_logging()
    if not torch.cuda.is_available():
        NVML_CUDA_CHECK.set("0")
    if slurm.job_id() is not None:
        OFFLINE.set("1")  # otherwise all ranks, or all jobs, would download at once
    try:
        TrainingCommand(command, arguments)  # LightningCLI runs the whole command in its constructor
        leave_process_group()
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except Stopped:
        leave_process_group()
        raise  # to `cli.main`, which requeues the job
    except (MemoryError, RuntimeError) as error:
        faults.raise_if_out_of_memory(error)
        raise
    finally:
        _end_tracking()  # again, because a signal may have interrupted it; before Slurm ends the job


def _end_tracking() -> None:
    """Finish the W&B run, unless a second Ctrl-C asked the process to end at once."""
    if not signals.was_interrupted():
        finish_tracking()


class TrainingCommand(CheckedCommand):
    """Check the settings, open the run's folder, build the trainer, and run it."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        try:
            with ExitStack() as self.open_run:
                super().__init__(command, arguments)
        except Stopped as stop:
            stop.resume_command = resume_command(self.folder)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check the settings, open the run's folder, and build the trainer.

        Lightning calls this before it runs the command, so nothing is written until all checks pass.
        """
        self.target = self.locate_and_check()
        trainer = self.config_init[self.command].trainer
        seed = self.settings.seed_everything
        shows_progress = trainer.enable_progress_bar is not False
        loggers: list[Any] = [] if isinstance(trainer.logger, bool) else as_list(trainer.logger)
        if self.command == "fit":
            self._open_folder()
            callbacks = self._fit_callbacks(seed, shows_progress)
            if self.folder is not None and is_rank_zero():
                loggers = [*run_loggers(self.folder, self.values), *loggers]
        else:
            if is_rank_zero():
                self._print_checkpoint()
            bar = [MetaStepProgressBar()] if shows_progress else []
            results = ResultTable(self.folder, self.target.differences)
            callbacks = [StopOnSignal(), SeedRandomNumbers(seed), *bar, results]
        return super().instantiate_trainer(
            logger=loggers or False,
            callbacks=[*as_list(trainer.callbacks), *callbacks],
            profiler=trainer.profiler or NoProfiler(),
            # Ours counts meta-steps, Lightning's counts batches.
            val_check_interval=trainer.val_check_interval * trainer.accumulate_grad_batches,
            # Not the working directory, where Lightning would resume from any hpc_ckpt_*.ckpt.
            default_root_dir=self.folder or NO_FOLDER,
            plugins=[*as_list(trainer.plugins), AtomicCheckpointIO(self.folder), *cluster_environment()],
            **kwargs,
        )

    def _open_folder(self) -> None:
        """Create or reopen the run's folder, lock it, and write the resolved config into it.

        Only rank 0 does. The ranks that Lightning starts find the folder in their environment; those
        that `srun` starts write nothing and need none.
        """
        if not is_rank_zero():
            self.folder = self.folder or RUN_DIR.get()
            return
        job = slurm.job_id()
        if job is None and self.folder is not None:
            resumes = self.target.resumes
            remedy = "wait for it" if resumes else "name another folder with --run.dir"
            check_no_active_job(self.folder, remedy)
        self.folder = self.open_run.enter_context(open_run_folder(self.folder, self.run_name, job))
        self.open_run.callback(_end_tracking)  # while the folder is still locked
        if not self.target.resumes:
            check_free(self.folder)  # again, now that the lock excludes other trainings
            # A killed start left it. With it, the best score of the run that `ckpt_path` belongs to
            # would be loaded as if it were this run's.
            run_folder.checkpoint_path(self.folder, "best").unlink(missing_ok=True)
        remove_unfinished(self.folder)
        RUN_DIR.set(str(self.folder))
        text = yaml.safe_dump(self.values, sort_keys=False)
        write_atomically(self.folder / run_folder.CONFIG, text)
        run_folder.record_slurm_job(self.folder, job)
        start = self.target.checkpoint
        print(f"Run folder: {printable(self.folder)}" + (f", from {printable(start)}" if start else ""))

    def _print_checkpoint(self) -> None:
        """Name the checkpoint to evaluate; without one, the command that evaluates a trained run."""
        if self.target.checkpoint is not None:
            print(f"Checkpoint: {printable(self.target.checkpoint)}")
            return
        folder = newest_trained_run(self.requested)
        config = str((folder or Path("RUN_DIR")) / run_folder.CONFIG)
        verb = {"test": "testing", "validate": "validating"}[self.command]
        print(f"No checkpoint: {verb} the initial parameters; to {self.command} a trained run:")
        print(f"  {printable(shlex.join(['maml', self.command, '--config', config]))}")

    def _fit_callbacks(self, seed: int, shows_progress: bool) -> list[Callback]:
        probes: ProbeSettings = self.config_init[self.command].probes
        callbacks = fit_callbacks(
            self.folder or NO_FOLDER,
            self.settings.run,
            probes,
            seed,
            ResultTable(self.folder, self.target.differences),
            shows_progress,
        )
        self.best, self.time = callbacks.best, callbacks.time
        return callbacks.ordered

    def command_arguments(self, command: str) -> dict[str, Any]:
        """Return the arguments of `Trainer.fit`, `validate` or `test`."""
        arguments = super().command_arguments(command)
        arguments |= {"weights_only": True, "ckpt_path": self.settings.ckpt_path}
        return arguments if command == "fit" else arguments | {"verbose": False}

    def after_fit(self) -> None:
        """Test the best checkpoint, or the final state if nothing was validated; attach artifacts.

        The last lines tell how long it took, and what to type next.
        """
        align_logged_step(self.trainer)
        self.trainer.test(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=self.best.best_model_path or None,
            verbose=False,
            weights_only=True,
        )
        attach_artifacts(self.trainer, self.best.best_model_path, self.settings.run.artifacts)
        if self.folder is not None and is_rank_zero():
            print_end(self.folder, self.time)
