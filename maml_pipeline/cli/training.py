"""`maml fit | validate | test`: Lightning's command line with this project's defaults."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import restricted_number_type
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from maml_pipeline.cli.artifacts import attach_artifacts
from maml_pipeline.cli.checks import check
from maml_pipeline.cli.parser import MamlParser
from maml_pipeline.cli.stopping import end_stopped, leave_process_group
from maml_pipeline.cli.terminal import configure_logging, is_rank_zero
from maml_pipeline.errors import UserError
from maml_pipeline.files import write_whole
from maml_pipeline.learner import MetaLearner, TaskDataModule, slurm
from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint, WholeCheckpointIO
from maml_pipeline.learner.early_end import EndEarly
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.preemption import StopOnSignal, Stopped
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress import MetaStepProgressBar, ResultTable
from maml_pipeline.learner.tracking import BeginTracking, finish_tracking, run_loggers
from maml_pipeline.limits import MAX_SEED
from maml_pipeline.runs import folder as run_folder
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

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        super().__init__(
            MetaLearner,
            TaskDataModule,
            args=[command, *arguments],
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
        """Find the run that is to be gone on with or measured, where there is one."""
        order = "first" if self.settings.model.first_order else "second"
        self.run_name = f"{self.settings.run.experiment}-{order}-s{self.settings.seed_everything}"
        explicit = None if self.settings.run.dir is None else Path(str(self.settings.run.dir))
        wanted = self.settings.ckpt_path
        self.folder = explicit
        self.resumes = wanted in ("best", "last")
        if self.resumes:
            self.folder = run_folder.find(explicit, self.run_name, wanted)
            self.settings.ckpt_path = str(run_folder.checkpoint(self.folder, wanted))
        elif wanted is not None and not Path(wanted).is_file():
            raise UserError(f"ckpt_path {wanted} does not exist; give best, last or a file's path")
        elif wanted is None and self.command == "fit":
            self._find_own_job(explicit)
        if slurm.starts_processes() and str(self.settings.trainer.devices) in WHATEVER_THERE_IS:
            self.settings.trainer.devices = slurm.tasks_per_node()

    def _find_own_job(self, explicit: Path | None) -> None:
        """Go on with the run that this very Slurm job has begun, if it was requeued."""
        job = slurm.job_id()
        if job is None or not slurm.is_restart():
            return
        folder = run_folder.find_of_job(explicit, self.run_name, job)
        if folder is not None:
            self.folder, self.resumes = folder, True
            last = run_folder.checkpoint(folder, "last")
            self.settings.ckpt_path = str(last) if last.exists() else None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check, make the run's folder, and build the trainer."""
        check(self)
        wanted = self.config_init[self.command].trainer
        callbacks: list[Callback] = []
        loggers: list[Any] = [] if isinstance(wanted.logger, bool) else _as_list(wanted.logger)
        if self.command == "fit":
            self._open_folder()
            callbacks += self._fit_callbacks()
            if self.folder is not None and is_rank_zero():
                loggers = [*run_loggers(self.folder, self.resolved_config), *loggers]
        if wanted.enable_progress_bar is not False:
            callbacks.append(MetaStepProgressBar())
        callbacks.append(ResultTable(self.folder))
        return super().instantiate_trainer(
            logger=loggers or False,
            callbacks=[*_as_list(wanted.callbacks), *callbacks],
            # Not the working directory, where Lightning would go on with a stranger's hpc_ckpt_*.ckpt.
            default_root_dir=self.folder or NO_FOLDER,
            plugins=[*_as_list(wanted.plugins), *_plugins()],
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
        if not self.resumes:
            self.folder = run_folder.create(self.folder, self.run_name)
        assert self.folder is not None
        os.environ[RUN_DIR_VARIABLE] = str(self.folder)
        self.settings.run.dir = str(self.folder)
        if (job := slurm.job_id()) is not None:
            write_whole(self.folder / slurm.JOB_FILE, job + "\n")

        text = self._parser(self.command).dump(self.settings, skip_unset=False)
        self.resolved_config: dict[str, Any] = yaml.safe_load(text)
        write_whole(self.folder / "config.yaml", text)
        print(f"Run folder: {self.folder}")

    def _fit_callbacks(self) -> list[Callback]:
        run, checkpoints = self.settings.run, (self.folder or NO_FOLDER) / "checkpoints"
        self.best = BestCheckpoint(checkpoints, run.monitor, run.mode)
        probes: ProbeSettings = self.config_init[self.command].probes
        stop = StopOnSignal()
        last = LastCheckpoint(checkpoints, run.checkpoint_every, stop)
        tracking = [DropRepeatedRows(), BeginTracking()]
        return [*tracking, stop, *probes.callbacks(), EndEarly(), self.best, last]

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
        if subcommand != "fit":
            kwargs["verbose"] = False
        return kwargs


def _plugins() -> list[Any]:
    plugins: list[Any] = [WholeCheckpointIO()]
    if slurm.starts_processes():
        # Lightning's own requeueing saves in the middle of a meta-step: see StopOnSignal.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
