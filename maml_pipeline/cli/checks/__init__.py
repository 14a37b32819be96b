"""Check the settings of a training before its folder is created."""

import os

import torch
from jsonargparse import Namespace

from maml_pipeline import slurm
from maml_pipeline.cli.checks.callbacks import check_callbacks
from maml_pipeline.cli.checks.epochs import check_epochs
from maml_pipeline.cli.checks.optimization import check_optimization
from maml_pipeline.cli.checks.tasks import check_tasks
from maml_pipeline.cli.checks.trainer import check_trainer
from maml_pipeline.cli.checks.validations import check_validations
from maml_pipeline.cli.ranges import check_ranges
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.rank import is_rank_zero
from maml_pipeline.slurm.allocation import AUTO_DEVICES, count_devices
from maml_pipeline.text import counted


def check_settings(
    command: str,
    settings: Namespace,
    built_trainer: Namespace,
    model: MetaLearner,
    data: TaskDataModule,
    elsewhere: bool = False,
) -> None:
    """Check every setting that can be checked without training.

    Args:
        command: `fit`, `validate` or `test`.
        settings: The parsed settings.
        built_trainer: `trainer` of the settings, with its classes instantiated.
        model: Built from the settings.
        data: Built from the settings.
        elsewhere: Whether the command will run on another machine, so that this machine's devices,
            processes and memory do not matter.

    Raises:
        UserError: A setting cannot work.
    """
    trainer = settings.trainer
    check_ranges(settings)
    check_epochs(trainer)
    check_callbacks(built_trainer.callbacks, model.evaluation_names("val"), command)
    if str(trainer.devices) not in AUTO_DEVICES:
        devices = count_devices(trainer.devices)
        _check_devices(data, trainer, devices, elsewhere)
        if slurm.starts_processes():
            slurm.check_allocation(devices, trainer.num_nodes)
    on_cpu = check_trainer(trainer, built_trainer, elsewhere)
    if is_rank_zero():
        prepare_data(data, settings)
    check_tasks(command, model, data, settings, elsewhere)
    if settings.ckpt_path is not None:
        model.on_load_checkpoint(load_checkpoint(settings.ckpt_path, resumes=command == "fit"))
    names, monitor = model.evaluation_names("val"), settings.run.monitor
    if monitor not in names:
        raise UserError(f"run.monitor is {monitor}; this run logs {listed(names)}")
    check_optimization(model, settings, names, on_cpu)
    if command == "fit":  # a test leaves early stopping and the schedule unused
        check_validations(trainer, built_trainer.callbacks, model)


def _check_devices(data: TaskDataModule, trainer: Namespace, devices: int, elsewhere: bool) -> None:
    """Check that the devices divide the meta-batch; say if this machine has fewer."""
    try:
        data.check_devices(devices * trainer.num_nodes)
    except UserError as error:
        on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
        available = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
        if elsewhere or devices <= available:
            raise
        here = counted(available, "GPU" if on_gpu else "CPU core")
        raise UserError(f"trainer.devices is {devices}, but this machine has {here}; {error}") from None


def prepare_data(data: TaskDataModule, settings: Namespace) -> None:
    """Download or pack the data of the tasks, if they are not.

    Args:
        data: The data module.
        settings: The parsed settings.

    Raises:
        UserError: It fails. The message names the argument with its key in full.
    """
    try:
        data.prepare_data()
    except UserError as error:
        if str(error).partition(" ")[0] in (settings.data.tasks.get("init_args") or {}):
            raise UserError(f"data.tasks.{error}") from error
        raise


def listed(names: list[str], most: int = 8) -> str:
    """Join names with commas, leaving out the middle of a long list."""
    if len(names) > most:
        names = [*names[: most // 2], "...", *names[-most // 2 :]]
    return ", ".join(names)
