"""Check that Lightning's trainer can be built, before anything is written."""

import inspect
import os
from typing import Any

from jsonargparse import Namespace
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from maml_pipeline.cli.checks.blame import short_reason
from maml_pipeline.cli.checks.callbacks import as_list
from maml_pipeline.cli.cluster_environment import cluster_environment
from maml_pipeline.environment import MASTER_ADDR, MASTER_PORT, NODE_RANK
from maml_pipeline.errors import UserError
from maml_pipeline.learner import lightning_internals
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO

KEPT_OUT = ("default_root_dir", "enable_checkpointing", "logger")
"""Keys that a run sets itself, or that write files when the trainer is built."""


def check_trainer(settings: Namespace, built: Namespace, elsewhere: bool) -> bool:
    """Refuse settings with which Lightning builds no trainer, or one that would wait forever.

    Args:
        settings: The parsed settings of `trainer`.
        built: The same, with their classes instantiated.
        elsewhere: Whether the training will run on another machine.

    Returns:
        Whether it will run on a CPU.

    Raises:
        UserError: No trainer can be built, or its strategy cannot train here.
    """
    arguments = {key: value for key, value in vars(built).items() if key not in KEPT_OUT}
    arguments["callbacks"] = as_list(built.callbacks)[:]
    arguments["plugins"] = [*as_list(built.plugins), *_own_plugins()]
    if elsewhere:
        arguments |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    trainer = _try(arguments)
    if isinstance(trainer, Exception):
        raise UserError(_reason(arguments, settings, trainer)) from trainer
    _check_strategy(trainer, settings)
    if elsewhere:
        return bool(settings.accelerator == "cpu")
    _check_nodes(trainer, settings)
    return bool(trainer.strategy.root_device.type == "cpu")


def _try(arguments: dict[str, Any]) -> Trainer | Exception:
    """Build a trainer that runs nothing, or return the error of Lightning or PyTorch."""
    try:
        # The run's loggers and checkpoints do not exist yet.
        own: dict[str, Any] = {
            "logger": False,
            "enable_checkpointing": True,
            "default_root_dir": os.devnull,
        }
        return Trainer(**arguments, **own)
    except Exception as error:
        return error


def _own_plugins() -> list[Any]:
    """Return the plugins that a training adds to those of the configuration."""
    return [AtomicCheckpointIO(), *cluster_environment()]


def _reason(arguments: dict[str, Any], settings: Namespace, error: Exception) -> str:
    """Name the key without which the trainer can be built, or fails with another error."""
    text = short_reason(error)
    for key, default in _defaults().items():
        if key in settings and arguments.get(key, default) != default:
            changed = _try({**arguments, key: default})
            if isinstance(changed, Trainer) or short_reason(changed) != text:
                return f"trainer.{key} is {_shown(settings[key])}, which Lightning refuses: {text}"
    return f"trainer: Lightning refuses its settings: {text}"


def _shown(value: Any) -> str:
    """Format a value of the configuration; a class by its path."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value.get("class_path", value) if isinstance(value, Namespace) else value)


def _defaults() -> dict[str, Any]:
    """Return the value of each trainer key that is tried, to find the key that causes an error."""
    parameters = inspect.signature(Trainer.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    own = {"callbacks": [], "plugins": _own_plugins()}
    return {**defaults, **own} | {"devices": 1, "accelerator": "cpu"}


def _check_strategy(trainer: Trainer, settings: Namespace) -> None:
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise UserError(
            f"trainer.strategy is {settings.strategy}, which cannot compute meta-gradients: every "
            "process needs all parameters; use ddp or auto"
        )
    if not lightning_internals.starts_ranks_by_script(trainer):
        raise UserError(
            f"trainer.strategy is {settings.strategy}; a training cannot be sent to spawned or forked "
            "processes; use ddp"
        )


def _check_nodes(trainer: Trainer, settings: Namespace) -> None:
    """Refuse to wait for ranks on other nodes that nothing starts."""
    environment = lightning_internals.chosen_cluster_environment(trainer)
    if settings.num_nodes == 1 or not isinstance(environment, LightningEnvironment):
        return
    needed = (MASTER_ADDR, MASTER_PORT, NODE_RANK)
    missing = [variable.name for variable in needed if not variable.is_set()]
    if missing:
        raise UserError(
            f"trainer.num_nodes is {settings.num_nodes}, but nothing starts processes on other nodes: "
            f"use `maml submit`, srun or torchrun, or set {', '.join(missing)} on each node"
        )
