"""`fit`, `validate` and `test` up to the point where they touch the disk: parse, build, check."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import restricted_number_type
from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline import slurm
from maml_pipeline.cli.checkpoint_to_evaluate import find_evaluation_target
from maml_pipeline.cli.checks import check_settings
from maml_pipeline.cli.checks.varied import check_varied
from maml_pipeline.cli.config_files import find_shipped
from maml_pipeline.cli.jsonargparse_internals import HookedCLI
from maml_pipeline.cli.requested_run import RequestedRun
from maml_pipeline.cli.start_or_resume import RunTarget, find_training_target
from maml_pipeline.cli.training_help import DESCRIPTIONS, usage
from maml_pipeline.cli.training_parser import TrainingParser
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.probes import ProbeSettings
from maml_pipeline.limits import MAX_SEED
from maml_pipeline.run_folder import RunSettings
from maml_pipeline.runs.results import RESULT_FILES
from maml_pipeline.slurm.allocation import AUTO_DEVICES

Seed = restricted_number_type("Seed", int, [(">=", 0), ("<=", MAX_SEED)])

TRAINER_DEFAULTS = {
    # One endless epoch: everything is counted in meta-steps.
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 500,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class CheckedCommand(HookedCLI):
    """Lightning's command line with this project's keys, defaults and checks.

    Args:
        command: `fit`, `validate` or `test`.
        arguments: The arguments after the command.
        elsewhere: Whether the command will run on another machine.

    Raises:
        UserError: A setting is invalid.
    """

    def __init__(self, command: str, arguments: Sequence[str], elsewhere: bool = False) -> None:
        self.command = command
        self.elsewhere = elsewhere
        self.folder: Path | None = None
        super().__init__(
            MetaLearner,
            TaskDataModule,
            args=[command, *find_shipped(arguments)],
            parser_class=TrainingParser,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={command: {"usage": usage(command), "description": DESCRIPTIONS[command]}},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Offer only the current command: setting up each takes time."""
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders"}
        return {self.command: {"model", "datamodule", "verbose", "weights_only"} | loaders}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, which is always set."""
        help_text = "Seed of the initial parameters and of the training tasks."
        parser.add_argument("--seed_everything", type=Seed, default=0, help=help_text)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the run and of its probes."""
        parser.add_class_arguments(RunSettings, "run")
        parser.add_class_arguments(ProbeSettings, "probes")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args`; Lightning would warn where the process has other arguments."""
        self.config = parser.parse_args(args)
        self.settings = self.config[self.command]

    def before_instantiate_classes(self) -> None:
        """Use the devices that `srun` started tasks for, where the settings leave them open."""
        if slurm.starts_processes() and str(self.settings.trainer.devices) in AUTO_DEVICES:
            self.settings.trainer.devices = slurm.tasks_per_node()

    def locate_and_check(self) -> RunTarget:
        """Find the run to start, resume or evaluate, and check every setting.

        Sets `requested`, `run_name`, `values`, the configuration as plain values, and `folder`.

        Returns:
            The run's folder and the checkpoint to start from.

        Raises:
            UserError: There is no such run or checkpoint, or a setting is invalid.
        """
        requested = RequestedRun.read(
            self.command_parser(self.command), self.settings, self.datamodule.tasks
        )
        self.requested = requested
        self.run_name, self.values = requested.name, requested.values
        check_varied(self.values)
        if self.command == "fit":
            target = find_training_target(requested)
        else:
            target = find_evaluation_target(requested, RESULT_FILES[self.command])
        self.folder = target.folder
        self.settings.ckpt_path = None if target.checkpoint is None else str(target.checkpoint)
        built_trainer = self.config_init[self.command].trainer
        check_settings(
            self.command, self.settings, built_trainer, self.model, self.datamodule, self.elsewhere
        )
        return target
