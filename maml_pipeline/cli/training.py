"""`maml fit | validate | test`: Lightning's command line with this project's defaults."""

import difflib
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse.typing import NonNegativeInt
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities import rank_zero_only

from maml_pipeline.cli import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.checkpoints import BestCheckpoint, LastCheckpoint
from maml_pipeline.learner.metrics_csv import DropRepeatedRows
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.learner.progress import MetaStepProgressBar, ResultTable
from maml_pipeline.learner.tracking import finish_tracking, run_loggers

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
    finally:
        finish_tracking()


def quieten() -> None:
    """Show what this project has to say, and keep what a person cannot act on off the terminal."""
    own = logging.getLogger("maml_pipeline")
    if not own.handlers:
        own.addHandler(logging.StreamHandler())
    own.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.WARNING)  # type: ignore[attr-defined]
    for source in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(source).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tasks are drawn faster than they are learned from
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # limit_val_batches=0
        ".*has `__len__` defined.*",  # exact here, whatever the number of workers
        ".*LeafSpec.*",  # Lightning's use of PyTorch
        ".*callbacks used to create the checkpoint need to be provided.*",  # not to test it
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    ):
        warnings.filterwarnings("ignore", message)


class MamlParser(LightningArgumentParser):
    """A parser whose errors are one or two lines."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong without the whole usage, and exit with status 2."""
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        sys.stderr.write("maml: error: " + " ".join(lines) + self._suggestion(message) + "\n")
        sys.exit(2)

    def _suggestion(self, message: str) -> str:
        """Name the keys that come closest to one that does not exist."""
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|[Oo]ption '([\w.]+)'", message)
        if unknown is None:
            return ""
        key = unknown[1] or unknown[2]
        parsers = [self]
        if self._subcommands_action is not None:
            parsers += self._subcommands_action._name_parser_map.values()
        keys = [action.dest for parser in parsers for action in parser._actions]
        close = difflib.get_close_matches(key, keys, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else ""


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
            type=NonNegativeInt,
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Check, make the run's folder, and build the trainer."""
        self.check()
        wanted = self.config_init[self.command].trainer
        callbacks: list[Callback] = []
        if self.command == "fit":
            folder = self._open_folder()
            callbacks += self._fit_callbacks(folder)
            if wanted.logger is None:
                kwargs["logger"] = run_loggers(folder, self.run_name, self.resolved_config)
        else:
            kwargs["logger"] = wanted.logger or False
        if wanted.enable_progress_bar is not False:
            callbacks.append(MetaStepProgressBar())
        callbacks.append(ResultTable(self.folder))
        return super().instantiate_trainer(
            callbacks=[*(wanted.callbacks or []), *callbacks],
            default_root_dir=self.folder or Path.cwd(),
            enable_checkpointing=self.command == "fit",
            **kwargs,
        )

    def check(self) -> None:
        """Check everything that can be checked before the run's folder is made."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.datamodule.prepare_data()
        self.model.check_task(self.datamodule.tasks.task(self.datamodule.seed, "train", 0))
        if self.settings.ckpt_path is not None:
            self.model.on_load_checkpoint(load_checkpoint(self.settings.ckpt_path))
        self._check_settings(self.config_init[self.command].trainer.val_check_interval)

    def _check_settings(self, val_check_interval: Any) -> None:
        """Refuse what Lightning would only find out in the middle of the run."""
        if isinstance(val_check_interval, float) and val_check_interval != 1.0:
            raise UserError(
                f"trainer.val_check_interval is {val_check_interval}; tasks come without end, so it "
                "must be a whole number of meta-steps"
            )
        names, monitor = self.model.evaluation_names("val"), self.settings.run.monitor
        if monitor not in names:
            raise UserError(f"run.monitor is {monitor}; this run logs {', '.join(names)}")

    def _open_folder(self) -> Path:
        """Make or re-open the run's folder and keep the resolved config in it."""
        rank_zero = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if self.resumes:
            assert self.folder is not None
        elif not rank_zero and RUN_DIR_VARIABLE in os.environ:
            # The processes that Lightning starts for further devices use the first one's folder.
            self.folder = Path(os.environ[RUN_DIR_VARIABLE])
        else:
            self.folder = run_folder.create(self.folder, self.run_name)
            os.environ[RUN_DIR_VARIABLE] = str(self.folder)
        self.settings.run.dir = str(self.folder)

        text = self._parser(self.command).dump(self.settings, skip_unset=False)
        self.resolved_config: dict[str, Any] = yaml.safe_load(text)
        if rank_zero:
            (self.folder / "config.yaml").write_text(text)
            print(f"Run folder: {self.folder}")
        return self.folder

    def _fit_callbacks(self, folder: Path) -> list[Callback]:
        run, checkpoints = self.settings.run, folder / "checkpoints"
        self.best = BestCheckpoint(checkpoints, run.monitor, run.mode)
        probes: ProbeSettings = self.config_init[self.command].probes
        last = LastCheckpoint(checkpoints, run.checkpoint_every)
        return [DropRepeatedRows(), *probes.callbacks(), self.best, last]

    def after_fit(self) -> None:
        """Test the best checkpoint, or the final state where nothing was validated."""
        self.trainer.test(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=self.best.best_model_path or None,
            verbose=False,
            weights_only=True,
        )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand != "fit":
            kwargs["verbose"] = False
        return kwargs


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, and nothing in it that could run code.

    Raises:
        UserError: It is no checkpoint of this program, or damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program, or damaged") from error
    if "state_dict" not in checkpoint:
        raise UserError(f"ckpt_path {path} is not a checkpoint of this program: no state_dict in it")
    return checkpoint
