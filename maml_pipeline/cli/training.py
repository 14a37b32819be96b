"""`maml fit | validate | test`: Lightning's command line with this project's defaults."""

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from maml_pipeline.cli import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.progress import MetaStepProgressBar, ResultTable
from maml_pipeline.learner.tracking import run_loggers

RUN_DIR_VARIABLE = "MAML_RUN_DIR"


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one command with its arguments.

    Raises:
        UserError: The person can put it right.
    """
    quieten()
    try:
        MamlCLI(command, arguments)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def quieten() -> None:
    """Keep what a person cannot act on off the terminal."""
    for source in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(source).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tasks are drawn faster than they are learned from
        ".*has `__len__` defined.*",  # exact here, whatever the number of workers
        ".*LeafSpec.*",  # Lightning's use of PyTorch
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    ):
        warnings.filterwarnings("ignore", message)


class MamlParser(LightningArgumentParser):
    """A parser whose errors are one or two lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong without the whole usage, and exit with status 2."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        sys.stderr.write("maml: error: " + " ".join(lines) + "\n")
        sys.exit(2)


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
        skipped = {"model", "datamodule", "verbose", "weights_only"}
        loaders = {"fit": {"train_dataloaders", "val_dataloaders"}}
        return {self.command: skipped | loaders.get(self.command, {"dataloaders"})}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever this process was started with."""
        self.config = parser.parse_args(args)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which is always set."""
        parser.add_argument(
            "--seed_everything",
            type=NonNegativeInt,
            default=0,
            help="Seed of the initial parameters and of the training tasks.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own settings."""
        parser.add_class_arguments(run_folder.RunSettings, "run")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Find the run that is to be gone on with or measured, if any."""
        config = self.config[self.command]
        order = "first" if config.model.first_order else "second"
        self.run_name = f"{config.run.experiment}-{order}-s{config.seed_everything}"
        self.folder: Path | None = None
        if config.ckpt_path in ("best", "last"):
            self.folder = run_folder.find(_path(config.run.dir), self.run_name, config.ckpt_path)
            config.ckpt_path = str(run_folder.checkpoint(self.folder, config.ckpt_path))
        elif config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            raise UserError(
                f"ckpt_path {config.ckpt_path} does not exist; give best, last or a file's path"
            )
        elif self.command != "fit":
            self.folder = _path(config.run.dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check everything that can be checked, and only then make the run's folder."""
        config = self.config[self.command]
        if rank_zero_only.rank == 0:
            self.datamodule.prepare_data()
        self.model.check_task(self.datamodule.tasks.task(self.datamodule.seed, "train", 0))
        if config.ckpt_path is not None:
            self.model.on_load_checkpoint(_load(config.ckpt_path))

        trainer = self.config_init[self.command].trainer
        callbacks = list(trainer.callbacks or [])
        if self.command == "fit":
            callbacks += self._fit_callbacks()
            if trainer.logger is None:
                kwargs["logger"] = run_loggers(self.folder, self.run_name, self.resolved)
        else:
            kwargs["logger"] = trainer.logger or False
        if trainer.enable_progress_bar is not False:
            callbacks.append(MetaStepProgressBar())
        callbacks.append(ResultTable(self.folder))
        kwargs["enable_checkpointing"] = self.command == "fit"
        return super().instantiate_trainer(
            callbacks=callbacks, default_root_dir=self.folder or Path.cwd(), **kwargs
        )

    def _fit_callbacks(self) -> list[Any]:
        config = self.config[self.command]
        if self.folder is None:
            self.folder = self._create_folder(_path(config.run.dir))
        config.run.dir = str(self.folder)
        text = self._parser(self.command).dump(config, skip_none=False)
        self.resolved = yaml.safe_load(text)
        if rank_zero_only.rank == 0:
            (self.folder / "config.yaml").write_text(text)
            print(f"Run folder: {self.folder}")
        self.best = BestCheckpoint(
            self.folder / "checkpoints", monitor=config.run.monitor, mode=config.run.mode
        )
        last = LastCheckpoint(self.folder / "checkpoints", every=config.run.checkpoint_every)
        return [DropRepeatedRows(), self.best, last]

    def _create_folder(self, explicit: Path | None) -> Path:
        # The processes that Lightning starts for the other devices use the first one's folder.
        if rank_zero_only.rank != 0 and RUN_DIR_VARIABLE in os.environ:
            return Path(os.environ[RUN_DIR_VARIABLE])
        folder = run_folder.create(explicit, self.run_name)
        os.environ[RUN_DIR_VARIABLE] = str(folder)
        return folder

    def after_fit(self) -> None:
        """Test the best checkpoint, or the final state where nothing was validated."""
        best = self.best.best_model_path or None
        self.trainer.test(
            self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False, weights_only=True
        )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand != "fit":
            kwargs["verbose"] = False
        return kwargs


def _path(value: Any) -> Path | None:
    return None if value is None else Path(str(value))


def _load(path: str) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program, or damaged") from error
    if "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program: no state_dict in it")
    return checkpoint
