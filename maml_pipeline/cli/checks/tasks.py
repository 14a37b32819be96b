"""Check that tasks can be drawn, and that they fit memory, network and loss."""

import copy
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from jsonargparse import Namespace

from maml_pipeline.cli.checks.address_space import bounded_memory
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.workers import check_picklable
from maml_pipeline.tasks import Task
from maml_pipeline.tasks.task import SPLITS, Split

HEADS = ("ways", "num_classes", "n_classes", "out_features")
"""Common argument names for a network's number of outputs."""


def check_tasks(
    command: str, model: MetaLearner, data: TaskDataModule, settings: Namespace, elsewhere: bool
) -> None:
    """Draw tasks, and check the settings against one.

    Args:
        command: `fit`, `validate` or `test`.
        model: The model, which is tried on the task.
        data: The data module, already prepared.
        settings: The parsed configuration.
        elsewhere: Whether the training will run on another machine.

    Raises:
        UserError: A task cannot be drawn, or does not fit memory, network or loss.
    """
    with bounded_memory():
        task = data.check_splits(*_drawn(command, settings.trainer))
    if not elsewhere:
        _check_memory(task, data)
    _check_ways(task, model, data, settings)
    if data.num_workers:
        check_picklable(data.tasks)
    model.check_task(task)


def _drawn(command: str, trainer: Namespace) -> tuple[Sequence[Split], int]:
    """Return the splits that a command draws from, and the number of training batches."""
    if command != "fit":
        return ["val" if command == "validate" else "test"], 0
    splits: list[Split] = ["train", "test"] if trainer.limit_val_batches == 0 else [*SPLITS]
    return splits, max(trainer.max_steps, 0) * trainer.accumulate_grad_batches


def _check_memory(task: Task, data: TaskDataModule) -> None:
    of_task = sum(tensor.numel() * tensor.element_size() for tensor in task)
    needed, there = of_task * data.meta_batch_size, psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"data.meta_batch_size is {data.meta_batch_size}: its tasks need {_gigabytes(needed)}, but "
            f"this machine has {_gigabytes(there)} of memory"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB"


def _check_ways(task: Task, model: MetaLearner, data: TaskDataModule, settings: Namespace) -> None:
    """Refuse a network that has another number of outputs than a task has classes."""
    ways = getattr(data.tasks, "ways", None)
    if not isinstance(ways, int) or task.support_y.is_floating_point():
        return
    try:
        network = copy.deepcopy(model.network)  # so that running statistics do not change
        with torch.no_grad():
            prediction = network(task.support_x)
        if prediction.ndim != 2 or prediction.shape[-1] == ways:
            return
    except Exception:
        return  # `check_task` reports why the network fails, and what else it returns
    outputs = prediction.shape[-1]
    raise UserError(
        f"data.tasks.ways is {ways}, but network {type(network).__name__} has {outputs} outputs; "
        f"set --data.tasks.ways {outputs}" + _head_flag(settings.model.network, outputs, ways)
    )


def _head_flag(network: Any, outputs: int, ways: int) -> str:
    """Return the flag that gives the network as many outputs as there are classes."""
    arguments = network.get("init_args") or {}
    for name in HEADS:
        if arguments.get(name) == outputs:
            return f" or --model.network.{name} {ways}"
    return f" or give the network {ways} outputs"
