"""Checks of a training's settings, all made before its folder is created."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from maml_pipeline.cli.epochs import check_epochs
from maml_pipeline.cli.terminal import is_rank_zero
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, slurm
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.tasks import Task, TaskDistribution
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
    check_epochs(trainer)
    if str(trainer.devices) not in WHATEVER_THERE_IS:
        devices = count_devices(trainer.devices)
        data.check_devices(devices * trainer.num_nodes)
        if slurm.starts_processes():
            slurm.check_allocation(devices, trainer.num_nodes)
    if is_rank_zero():
        data.prepare_data()
    task = data.check_tasks(*_drawn(cli.command, trainer))
    model.check_task(task)
    _check_ways(model, data.tasks, task)
    if settings.ckpt_path is not None:
        resumes = cli.command == "fit"
        model.on_load_checkpoint(load_checkpoint(settings.ckpt_path, resumes))
    _check_validation(cli.config_init[cli.command].trainer.val_check_interval)
    names, monitor = model.evaluation_names("val"), settings.run.monitor
    if monitor not in names:
        raise UserError(f"run.monitor is {monitor}; this run logs {', '.join(names)}")


def _check_ways(model: MetaLearner, tasks: TaskDistribution, task: Task) -> None:
    """Refuse a classifier with more or fewer outputs than its tasks have ways.

    One with more trains without a complaint: some of its outputs are never right.
    """
    ways = getattr(tasks, "ways", None)
    if not isinstance(ways, int) or task.support_y.is_floating_point() or task.support_y.dim() != 1:
        return
    with torch.no_grad():
        prediction = copy.deepcopy(model.network)(task.support_x)  # so that no running statistic moves
    if prediction.dim() == 2 and prediction.shape[1] != ways:
        raise UserError(
            f"data.tasks has {ways} ways, but network {type(model.network).__name__} has "
            f"{prediction.shape[1]} outputs; give both the same number (--data.tasks.ways N "
            "--model.network.ways N for ConvNet)"
        )


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
