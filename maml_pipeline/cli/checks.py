"""Checks of a training's settings, all made before its folder is created."""

from typing import TYPE_CHECKING, Any

from maml_pipeline.cli.epochs import check_epochs
from maml_pipeline.cli.terminal import is_rank_zero
from maml_pipeline.errors import UserError
from maml_pipeline.learner import slurm
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.tools.submission import WHATEVER_THERE_IS, count_devices

if TYPE_CHECKING:
    from maml_pipeline.cli.training import MamlCLI


def check(cli: "MamlCLI") -> None:
    """Check everything that can be checked before the run's folder is made.

    Raises:
        UserError: A setting cannot work.
    """
    settings, model, data = cli.settings, cli.model, cli.datamodule
    trainer = settings.trainer
    if str(trainer.devices) not in WHATEVER_THERE_IS:
        devices = count_devices(trainer.devices)
        data.check_devices(devices * trainer.num_nodes)
        if slurm.starts_processes():
            slurm.check_allocation(devices, trainer.num_nodes)
    if is_rank_zero():
        data.prepare_data()
    model.check_task(data.tasks.task(data.seed, "train", 0))
    if settings.ckpt_path is not None:
        checkpoint = load_checkpoint(settings.ckpt_path, resumes=cli.command == "fit")
        model.on_load_checkpoint(checkpoint)
    _check_validation(cli.config_init[cli.command].trainer.val_check_interval)
    check_epochs(trainer)
    names, monitor = model.evaluation_names("val"), settings.run.monitor
    if monitor not in names:
        raise UserError(f"run.monitor is {monitor}; this run logs {', '.join(names)}")


def _check_validation(val_check_interval: Any) -> None:
    if isinstance(val_check_interval, float) and val_check_interval != 1.0:
        raise UserError(
            f"trainer.val_check_interval is {val_check_interval}; tasks come without end, so it "
            "must be a whole number of meta-steps"
        )
