"""`maml fit | validate | test`: Lightning's command line with this project's defaults."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from maml_pipeline import signals, slurm
from maml_pipeline.cli.artifacts import attach_artifacts
from maml_pipeline.cli.checks import check_settings
from maml_pipeline.cli.evaluation_target import find_evaluation_target
from maml_pipeline.cli.launcher import cluster_environment
from maml_pipeline.cli.requested_run import RequestedRun
from maml_pipeline.cli.stopping import end_stopped, leave_process_group
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.cli.training_parser import TrainingParser
from maml_pipeline.cli.training_target import check_free, find_training_target, resume_command
from maml_pipeline.environment import NVML_CUDA_CHECK, OFFLINE, RUN_DIR
from maml_pipeline.errors import UserError
from maml_pipeline.files import remove_unfinished, write_atomically
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from maml_pipeline.learner.early_stopping import EndEarly
from maml_pipeline.learner.lightning_internals import align_logged_step
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress import MetaStepProgressBar
from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from maml_pipeline.learner.tracking import StartTracking, finish_tracking
from maml_pipeline.limits import MAX_SEED
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.runs import folder as run_folder
from maml_pipeline.runs.lock import open_run_folder
from maml_pipeline.runs.loggers import run_loggers
from maml_pipeline.runs.results import RESULT_FILES, ResultTable
from maml_pipeline.signals import Stopped
from maml_pipeline.slurm.submission import AUTO_DEVICES
from maml_pipeline.text import printable

NO_FOLDER = Path(os.devnull)
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", MAX_SEED)])


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one command with its arguments.

    Raises:
        UserError: The person can put it right.
    """
    configure_logging()
    if not torch.cuda.is_available():
        NVML_CUDA_CHECK.set("0")
    if slurm.job_id() is not None:
        OFFLINE.set("1")  # ranks, or jobs, would download all at once
    try:
        MamlCLI(command, arguments)
        leave_process_group()
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except Stopped as stop:
        finish_tracking()  # before Slurm ends the job
        leave_process_group()
        end_stopped(stop)
    finally:
        _end_tracking()


def _end_tracking() -> None:
    """End the W&B run, unless a second Ctrl-C wants the process gone at once."""
    if not signals.was_interrupted():
        finish_tracking()


class MamlCLI(LightningCLI):
    """Parse, check, make the run's folder, and run."""

    elsewhere = False
    """Whether the training will run on another machine."""

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.folder: Path | None = None
        try:
            with ExitStack() as self.open_run:
                self._parse_and_run(arguments)
        except Stopped as stop:
            stop.resume_command = resume_command(self.folder)
            raise

    def _parse_and_run(self, arguments: Sequence[str]) -> None:
        super().__init__(
            MetaLearner,
            TaskDataModule,
            args=[self.command, *arguments],
            parser_class=TrainingParser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                # One endless epoch: the unit of everything is the meta-step.
                "max_epochs": -1,
                "check_val_every_n_epoch": None,
                "val_check_interval": 500,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer the command that was asked for alone: each costs time to set up."""
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders"}
        return {self.command: {"model", "datamodule", "verbose", "weights_only"} | loaders}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which is always set."""
        parser.add_argument(
            "--seed_everything",
            type=Seed,
            default=0,
            help="Seed of the initial parameters and of the training tasks.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own settings."""
        parser.add_class_arguments(run_folder.RunSettings, "run")
        parser.add_class_arguments(ProbeSettings, "probes")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever this process was started with."""
        self.config = parser.parse_args(args)
        self.settings = self.config[self.command]

    def _parse_ckpt_path(self) -> None:
        """Leave checkpoints closed while parsing: this project's hold no hyperparameters."""

    def before_instantiate_classes(self) -> None:
        """Take the devices that `srun` started a task for, where the settings name none."""
        if slurm.starts_processes() and str(self.settings.trainer.devices) in AUTO_DEVICES:
            self.settings.trainer.devices = slurm.tasks_per_node()

    def prepare(self) -> None:
        """Find the run that is to be resumed or measured, and check all that needs no training."""
        request = RequestedRun.read(self._parser(self.command), self.settings, self.datamodule.tasks)
        self.run_name, self.resolved_config = request.name, request.values
        if self.command == "fit":
            self.target = find_training_target(request)
        else:
            self.target = find_evaluation_target(request, RESULT_FILES[self.command])
        self.folder, checkpoint = self.target.folder, self.target.checkpoint
        self.settings.ckpt_path = None if checkpoint is None else str(checkpoint)
        built_trainer = self.config_init[self.command].trainer
        check_settings(
            self.command, self.settings, built_trainer, self.model, self.datamodule, self.elsewhere
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Locate the run, check, make its folder, and build the trainer."""
        self.prepare()
        wanted = self.config_init[self.command].trainer
        self.stop = StopOnSignal()
        callbacks: list[Callback] = [self.stop, SeedRandomNumbers(self.settings.seed_everything)]
        loggers: list[Any] = [] if isinstance(wanted.logger, bool) else _as_list(wanted.logger)
        if self.command == "fit":
            self._open_folder()
            callbacks += self._fit_callbacks()
            if self.folder is not None and is_rank_zero():
                loggers = [*run_loggers(self.folder, self.resolved_config), *loggers]
        elif self.target.checkpoint is not None and is_rank_zero():
            print(f"Checkpoint: {printable(self.target.checkpoint)}")
        if wanted.enable_progress_bar is not False:
            callbacks.append(MetaStepProgressBar())
        callbacks.append(ResultTable(self.folder, self.target.differences))
        return super().instantiate_trainer(
            logger=loggers or False,
            callbacks=[*_as_list(wanted.callbacks), *callbacks],
            # Ours counts meta-steps, Lightning's counts batches.
            val_check_interval=wanted.val_check_interval * wanted.accumulate_grad_batches,
            # Not the working directory, where Lightning would go on with a stranger's hpc_ckpt_*.ckpt.
            default_root_dir=self.folder or NO_FOLDER,
            plugins=[*_as_list(wanted.plugins), AtomicCheckpointIO(), *cluster_environment()],
            **kwargs,
        )

    def _open_folder(self) -> None:
        """Make or re-open the run's folder and keep the resolved config in it.

        Rank 0 does. The processes that Lightning starts for further devices find its folder in their
        environment; those that `srun` starts need none, for they write nothing.
        """
        if not is_rank_zero():
            self.folder = self.folder or RUN_DIR.get()
            return
        job = slurm.job_id()
        self.folder = self.open_run.enter_context(open_run_folder(self.folder, self.run_name, job))
        self.open_run.callback(_end_tracking)
        if not self.target.resumes:
            check_free(self.folder)  # once more, now that nobody else trains in it
        remove_unfinished(self.folder)
        RUN_DIR.set(str(self.folder))
        text = yaml.safe_dump(self.resolved_config, sort_keys=False)
        write_atomically(self.folder / run_folder.CONFIG, text)
        if job is not None:
            write_atomically(self.folder / run_folder.JOB, job + "\n")
        start = self.target.checkpoint
        print(f"Run folder: {printable(self.folder)}" + (f", from {printable(start)}" if start else ""))

    def _fit_callbacks(self) -> list[Callback]:
        run, folder = self.settings.run, self.folder or NO_FOLDER
        self.best = BestCheckpoint(folder / run_folder.BEST_CHECKPOINT, run.monitor, run.mode)
        probes: ProbeSettings = self.config_init[self.command].probes
        last = LastCheckpoint(folder / run_folder.LAST_CHECKPOINT, run.checkpoint_every, self.stop)
        tracking = StartTracking(folder / run_folder.BEST_CHECKPOINT)
        return [DropRepeatedRows(), tracking, *probes.callbacks(), EndEarly(), self.best, last]

    def after_fit(self) -> None:
        """Test the best checkpoint, or the final state where nothing was validated."""
        align_logged_step(self.trainer)
        self.trainer.test(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=self.best.best_model_path or None,
            verbose=False,
            weights_only=True,
        )
        attach_artifacts(self.trainer, self.best.best_model_path, self.settings.run.artifacts)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        kwargs["ckpt_path"] = self.settings.ckpt_path
        if subcommand != "fit":
            kwargs["verbose"] = False
        return kwargs


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
