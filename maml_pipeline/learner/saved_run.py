"""Build a learner from a run's folder, with the parameters of one of its checkpoints."""

import inspect
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentError
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LightningArgumentParser
from torch.nn.parameter import is_lazy

from maml_pipeline import run_folder
from maml_pipeline.errors import UserError, describe
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.meta_gradient.learn2learn_engine import learn2learn_maml

Learner = TypeVar("Learner", bound=LightningModule)
MAX_LISTED_CELLS = 12


def checkpoint_of_run(folder: Path, which: str) -> Path:
    """Return the path of a run's checkpoint.

    Args:
        folder: The run's folder.
        which: `best` or `last`; a run without a validation has no best one, so `best` is its last one.

    Raises:
        UserError: The folder is not a run's, or has no such checkpoint.
    """
    if which not in ("best", "last"):
        raise UserError(f"which is {which!r}; it must be 'best' or 'last'")
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"run folder {folder} {reason}; name the folder of a run, such as runs/NAME")
    cells = [run.name for run in sorted(folder.iterdir()) if run_folder.is_run_folder(run)]
    if not run_folder.is_run_folder(folder) and cells:
        listed = ", ".join(cells[:MAX_LISTED_CELLS]) + (", ..." if len(cells) > MAX_LISTED_CELLS else "")
        raise UserError(f"{folder} is not a run but holds several; name one of them: {listed}")
    if not run_folder.is_run_folder(folder):
        raise UserError(
            f"{folder} is not the folder of a run: it has no {run_folder.CONFIG} or no "
            f"{run_folder.CHECKPOINTS}/; name another"
        )
    last = which == "last"
    file = run_folder.checkpoint_path(folder, "last") if last else run_folder.checkpoint_to_test(folder)
    if not file.exists():
        raise UserError(f"run {folder} has no {file.name} yet; wait until its training has saved one")
    return file


def learner_of_run(cls: type[Learner], folder: Path, checkpoint: Path, device: Any) -> Learner:
    """Build the learner that a run's config describes, and load a checkpoint's parameters.

    Args:
        cls: The class of the learner.
        folder: The run's folder.
        checkpoint: One of its checkpoints.
        device: Where to put the learner.

    Returns:
        The learner, in evaluation mode.

    Raises:
        UserError: The config or the checkpoint cannot be read, a class cannot be imported or built, the
            two do not fit, or the device is not available.
    """
    device = available_device(device)
    state = load_checkpoint(checkpoint)
    with torch.inference_mode(False):
        learner = _built(cls, folder)
        load_parameters(learner, state, checkpoint)
    return learner.to(device).eval()


def learner_of_checkpoint(
    cls: type[Learner], checkpoint: Path, settings: dict[str, Any], device: Any
) -> Learner:
    """Build a learner from the arguments of its constructor, and load a checkpoint's parameters.

    Raises:
        UserError: Arguments are missing or unknown, the checkpoint cannot be read or does not fit, or
            the device is not available.
    """
    device = available_device(device)
    state = load_checkpoint(checkpoint)
    try:
        inspect.signature(cls).bind(**settings)
    except TypeError as error:
        given = (
            f"the given arguments do not fit ({error})" if settings else f"it has no settings ({error})"
        )
        raise UserError(
            f"checkpoint {checkpoint} cannot be loaded: {given}; call "
            f"{cls.__name__}.load_from_checkpoint(path, network=..., loss=..., inner_lr=...) with all "
            "arguments of the constructor, or with none if the checkpoint is in a run's folder"
        ) from error
    with torch.inference_mode(False):
        learner = cls(**settings)
        load_parameters(learner, state, checkpoint)
    return learner.to(device)


def load_parameters(learner: LightningModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Load a checkpoint's parameters, in the types in which they were saved.

    Args:
        learner: Its lazy layers take their shapes from the checkpoint.
        checkpoint: As read by `load_checkpoint`.
        path: The file, for the message.

    Raises:
        UserError: The checkpoint is of another network.
    """
    saved = checkpoint["state_dict"]
    for name, own in learner.state_dict(keep_vars=True).items():
        if name not in saved:
            continue
        if is_lazy(own):
            own.materialize(saved[name].shape, dtype=saved[name].dtype)
        elif own.is_floating_point():
            own.data = own.data.to(saved[name].dtype)  # such as float64 of trainer.precision 64-true
    try:
        learner.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    learner.load_state_dict(saved)


def available_device(device: Any) -> torch.device:
    """Return a device on which tensors can be created.

    Raises:
        UserError: There is no such device.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # PyTorch raises several types, without a common base class
        raise UserError(
            f"device is {str(device)!r}, which PyTorch cannot use here; give another, such as 'cpu'"
        ) from error
    return found


def _built(cls: type[Learner], folder: Path) -> Learner:
    config = folder / run_folder.CONFIG
    settings = run_folder.read_run_config(folder).get("model")
    if not isinstance(settings, dict):
        raise UserError(f"the run's config {config} has no model with settings; name another run")
    for key, path in _import_paths(settings, "model"):
        _check_import(path, f"{key} of {config}")
    settings = _with_available_engine(settings, config)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "model", fail_untyped=False)
    try:
        built = parser.instantiate(parser.parse_object({"model": settings}))
    except UserError as error:
        raise UserError(f"the learner of {config} cannot be built: {error}") from error
    except (ArgumentError, Exception) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the learner of {config} cannot be built: {reason[:300]}") from error
    learner: Learner = built.model
    return learner


def _with_available_engine(settings: dict[str, Any], config: Path) -> dict[str, Any]:
    """Replace an engine that is not installed by the other, which computes the same adaptation."""
    if settings.get("engine") != "learn2learn":
        return settings
    try:
        learn2learn_maml()
    except UserError:
        warnings.warn(
            f"engine in {config} is learn2learn, which cannot be imported; using native, whose "
            "results differ by rounding only",
            stacklevel=5,
        )
        return settings | {"engine": "native"}
    return settings


def _import_paths(settings: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the import path of every class or function that settings name."""
    for name, value in settings.items():
        if name == "class_path" and isinstance(value, str):
            yield key, value
        elif name in ("loss", "metric") and isinstance(value, str):
            yield f"{key}.{name}", value
        elif isinstance(value, dict):
            yield from _import_paths(value, key if name == "init_args" else f"{key}.{name}")


def _check_import(path: str, key: str) -> None:
    module, _, name = path.rpartition(".")
    try:
        getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key} is {path}, which cannot be imported ({error}): put the folder of "
            f"{str(error.name).partition('.')[0]} on PYTHONPATH or sys.path"
        ) from error
    except AttributeError as error:
        raise UserError(f"{key} is {path}, but {module} has no {name}") from error
    except Exception as error:  # importing runs the user's code
        raise UserError(f"{key} is {path}, which cannot be imported: {describe(error)}") from error
