"""Import what a command needs, once its arguments are known: help must not wait for PyTorch."""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from maml_pipeline.environment import RANKS, WANDB_DISABLED, WANDB_MODE
from maml_pipeline.garbage import collector_paused

SIGNAL = "scipy.signal"

TRAINING = ("fit", "validate", "test")
"""The commands that share one module."""


def import_command(command: str, arguments: Sequence[str]) -> ModuleType:
    """Import the module of a command.

    Args:
        command: Such as `fit`.
        arguments: The arguments after the command.
    """
    name = f"maml_pipeline.cli.{'training' if command in TRAINING else command}"
    with collector_paused(), without_scipy_signal():
        if command != "fit" or not _will_track(arguments):
            return import_module(name)
        # Before PyTorch: W&B's API looks its classes up among all modules that are imported, which
        # takes a second once Lightning is.
        import_module("wandb.apis.public")
        service = threading.Thread(target=_start_wandb_service, name="wandb-service", daemon=True)
        service.start()
        module = import_module(name)
        service.join()
        return module


@contextmanager
def without_scipy_signal() -> Iterator[None]:
    """Keep torchmetrics from importing `scipy.signal`, which takes half a second.

    Lightning imports torchmetrics, which gives `scipy.signal` an alias for another package's sake, if
    it has none. Here it finds a module that has one, and that imports the real one for anything else.
    """
    if SIGNAL in sys.modules:
        yield
        return
    sys.modules[SIGNAL] = late = _LateSignal(SIGNAL)
    try:
        yield
    finally:
        if sys.modules.get(SIGNAL) is late:
            del sys.modules[SIGNAL]


class _LateSignal(ModuleType):
    """Stands in for `scipy.signal` until something in it is needed."""

    hamming = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # which is asked for all modules
            raise AttributeError(name)
        if sys.modules.get(SIGNAL) is self:
            del sys.modules[SIGNAL]
        return getattr(import_module(SIGNAL), name)


def _will_track(arguments: Sequence[str]) -> bool:
    """Tell whether this process will log a training to W&B, as far as its environment tells."""
    only_prints = any(argument.startswith(("--print_config", "--help", "-h")) for argument in arguments)
    is_first = not any(rank.get() for rank in RANKS)
    is_disabled = WANDB_DISABLED.get() or WANDB_MODE.get() == "disabled"
    return is_first and not only_prints and not is_disabled


def _start_wandb_service() -> None:
    """Start the process that W&B logs with, for which it waits; what fails here fails again later."""
    import wandb

    with suppress(Exception):
        wandb.setup()
