"""Checks of a training's settings, all made before its folder is created."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maml_pipeline.cli.terminal import is_rank_zero
from maml_pipeline.errors import UserError
from maml_pipeline.learner import slurm
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.tasks.task import SPLITS, Split
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
    model.check_task(data.check_tasks(*_drawn(cli.command, trainer)))
    if settings.ckpt_path is not None:
        model.on_load_checkpoint(load_checkpoint(settings.ckpt_path))
    _check_validation(cli.config_init[cli.command].trainer.val_check_interval)
    names, monitor = model.evaluation_names("val"), settings.run.monitor
    if monitor not in names:
        raise UserError(f"run.monitor is {monitor}; this run logs {', '.join(names)}")


def _drawn(command: str, trainer: Any) -> tuple[Sequence[Split], int]:
    """Return the splits that a command draws from, and how many batches it trains on."""
    if command != "fit":
        return ["val" if command == "validate" else "test"], 0
    splits: list[Split] = ["train", "test"] if trainer.limit_val_batches == 0 else [*SPLITS]
    return splits, max(trainer.max_steps, 0) * trainer.accumulate_grad_batches


def _check_validation(val_check_interval: Any) -> None:
    if isinstance(val_check_interval, float) and val_check_interval != 1.0:
        raise UserError(
            f"trainer.val_check_interval is {val_check_interval}; tasks come without end, so it "
            "must be a whole number of meta-steps"
        )
