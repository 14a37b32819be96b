"""`maml fit | validate | test`: Lightning's command line with this project's defaults."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import restricted_number_type
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from maml_pipeline.cli.artifacts import attach_artifacts
from maml_pipeline.cli.checks import check
from maml_pipeline.cli.epochs import val_check_batches
from maml_pipeline.cli.launcher import cluster_environment
from maml_pipeline.cli.location import (
    Location,
    Request,
    carried_name,
    check_free,
    config_of_run,
    explicit_folder,
    locate_measurement,
    locate_training,
    read_config,
    resume_command,
)
from maml_pipeline.cli.parser import MamlParser
from maml_pipeline.cli.stopping import end_stopped, leave_process_group
from maml_pipeline.cli.terminal import configure_logging, is_rank_zero
from maml_pipeline.errors import UserError
from maml_pipeline.files import remove_unfinished, write_atomically
from maml_pipeline.learner import MetaLearner, TaskDataModule, slurm
from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint, WholeCheckpointIO
from maml_pipeline.learner.early_end import EndEarly
from maml_pipeline.learner.limits import MAX_SEED
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.preemption import StopOnSignal
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress import MetaStepProgressBar
from maml_pipeline.learner.random_numbers import SeedRandomNumbers
from maml_pipeline.learner.tracking import BeginTracking, finish_tracking, run_loggers
from maml_pipeline.runs import folder as run_folder
from maml_pipeline.runs.folder import check_name
from maml_pipeline.runs.lock import opened
from maml_pipeline.runs.results import RESULT_FILES, ResultTable
from maml_pipeline.signals import Stopped
from maml_pipeline.tasks.omniglot_images import OFFLINE_VARIABLE
from maml_pipeline.text import printable
from maml_pipeline.tools.submission import WHATEVER_THERE_IS

RUN_DIR_VARIABLE = "MAML_RUN_DIR"
NO_FOLDER = Path(os.devnull)
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", MAX_SEED)])


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one command with its arguments.

    Raises:
        UserError: The person can put it right.
    """
    configure_logging()
    if slurm.job_id() is not None:
        os.environ[OFFLINE_VARIABLE] = "1"  # ranks, or jobs, would download all at once
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
            parser_class=MamlParser,
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
        if slurm.starts_processes() and str(self.settings.trainer.devices) in WHATEVER_THERE_IS:
            self.settings.trainer.devices = slurm.tasks_per_node()

    def _locate(self) -> Location:
        """Find the run that is to be resumed or measured, where there is one."""
        order = "first" if self.settings.model.first_order else "second"
        config_of = config_of_run(self.settings.config)
        values = self.resolve_config()
        if config_of is not None:
            values["run"]["experiment"] = carried_name(
                values, self._with_defaults(read_config(config_of))
            )
        if values["run"]["experiment"] is None:
            check_name("the tasks' name", self.datamodule.tasks.name)
            values["run"]["experiment"] = self.datamodule.tasks.name
        self.settings.run.experiment = values["run"]["experiment"]
        self.run_name = f"{self.settings.run.experiment}-{order}-s{self.settings.seed_everything}"
        request = Request(
            name=self.run_name,
            values=values,
            with_defaults=self._with_defaults,
            run_dir=explicit_folder(self.settings.run.dir, config_of),
            config_of=config_of,
            ckpt_path=self.settings.ckpt_path,
        )
        if self.command == "fit":
            return locate_training(request)
        return locate_measurement(request, RESULT_FILES[self.command])

    def resolve_config(self) -> dict[str, Any]:
        """Return the settings as plain values: they say what a run is, not where or how it began."""
        settings = self.settings.clone()
        settings.ckpt_path, settings.run.dir = None, None
        values: dict[str, Any] = yaml.safe_load(
            self._parser(self.command).dump(settings, skip_unset=False)
        )
        return values

    def _with_defaults(self, values: dict[str, Any]) -> dict[str, Any]:
        """Fill the keys that the config of an older run lacks; leave one that has others as it is."""
        parser = self._parser(self.command)
        try:
            with redirect_stderr(StringIO()):
                text = parser.dump(parser.parse_object(values), skip_unset=False)
        except (Exception, SystemExit):
            return values
        filled: dict[str, Any] = yaml.safe_load(text)
        return filled

    def prepare(self) -> None:
        """Locate the run, and check all that needs no training."""
        self.location = self._locate()
        self.folder = self.location.folder
        checkpoint = self.location.checkpoint
        self.settings.ckpt_path = None if checkpoint is None else str(checkpoint)
        check(self, self.elsewhere)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Locate the run, check, make its folder, and build the trainer."""
        self.prepare()
        wanted = self.config_init[self.command].trainer
        self.stop = StopOnSignal()
        callbacks: list[Callback] = [self.stop]
        loggers: list[Any] = [] if isinstance(wanted.logger, bool) else _as_list(wanted.logger)
        if self.command == "fit":
            self._open_folder()
            callbacks += self._fit_callbacks()
            if self.folder is not None and is_rank_zero():
                loggers = [*run_loggers(self.folder, self.resolved_config), *loggers]
        if wanted.enable_progress_bar is not False:
            callbacks.append(MetaStepProgressBar())
        callbacks.append(ResultTable(self.folder, self.location.differences))
        kwargs["val_check_interval"] = val_check_batches(
            wanted.val_check_interval, wanted.accumulate_grad_batches
        )
        return super().instantiate_trainer(
            logger=loggers or False,
            callbacks=[
                SeedRandomNumbers(self.settings.seed_everything),
                *_as_list(wanted.callbacks),
                *callbacks,
            ],
            # Not the working directory, where Lightning would go on with a stranger's hpc_ckpt_*.ckpt.
            default_root_dir=self.folder or NO_FOLDER,
            plugins=[*_as_list(wanted.plugins), WholeCheckpointIO(), *cluster_environment()],
            **kwargs,
        )

    def _open_folder(self) -> None:
        """Make or re-open the run's folder and keep the resolved config in it.

        Rank 0 does. The processes that Lightning starts for further devices find its folder in their
        environment; those that `srun` starts need none, for they write nothing.
        """
        if not is_rank_zero():
            if self.folder is None and RUN_DIR_VARIABLE in os.environ:
                self.folder = Path(os.environ[RUN_DIR_VARIABLE])
            return
        job = slurm.job_id()
        self.folder = self.open_run.enter_context(opened(self.folder, self.run_name, job))
        self.open_run.callback(finish_tracking)
        if not self.location.resumes:
            check_free(self.folder)  # once more, now that nobody else trains in it
        remove_unfinished(self.folder)
        os.environ[RUN_DIR_VARIABLE] = str(self.folder)
        self.resolved_config = self.resolve_config()
        write_atomically(
            self.folder / run_folder.CONFIG, yaml.safe_dump(self.resolved_config, sort_keys=False)
        )
        if job is not None:
            write_atomically(self.folder / run_folder.JOB, job + "\n")
        print(f"Run folder: {printable(self.folder)}")

    def _fit_callbacks(self) -> list[Callback]:
        run, checkpoints = self.settings.run, (self.folder or NO_FOLDER) / run_folder.CHECKPOINTS
        self.best = BestCheckpoint(checkpoints, run.monitor, run.mode)
        probes: ProbeSettings = self.config_init[self.command].probes
        last = LastCheckpoint(checkpoints, run.checkpoint_every, self.stop)
        return [DropRepeatedRows(), BeginTracking(), *probes.callbacks(), EndEarly(), self.best, last]

    def after_fit(self) -> None:
        """Test the best checkpoint, or the final state where nothing was validated."""
        # Lightning logs the test at its own count, which a run resumed from its very end lags behind.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
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
