"""Exporting the network of a run for use elsewhere: its parameters, and how to rebuild it."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor

from maml_pipeline.errors import UserError, first_line
from maml_pipeline.files import make_folder, write_atomically
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.learner.learned_inner_lr import RATE_NAMES, RATES
from maml_pipeline.learner.saved_run import checkpoint_of_run
from maml_pipeline.run_folder import checkpoint_to_test
from maml_pipeline.runs.read import read_run_folder
from maml_pipeline.runs.run import Run, display_path, finite
from maml_pipeline.runs.validation import UnreadableRunError

SUFFIXES = (".safetensors", ".pt")

NETWORK = "network."
"""Prefix of the network's tensors in a checkpoint of `MetaLearner`."""

HEADER = """\
# A network that `maml export` wrote, whose parameters are in the file of the same name beside this one:
# its class with its arguments, how it adapts to a task, and the run that trained it.
"""

ADAPTATION = ("inner_lr", "inner_steps", "eval_inner_steps", "adapt", "loss", "transductive")
"""Keys of `model` that tell how the network is adapted to a task."""


@dataclass(frozen=True)
class Export:
    """An exported network.

    Args:
        file: The file with its parameters.
        config: The file with its class and its origin.
        checkpoint: The checkpoint that it was read from.
        meta_step: Meta-steps after which the checkpoint was saved.
        tensors: The number of its parameters and buffers.
        is_new: Whether a file was written; otherwise both existed with the same content.
    """

    file: Path
    config: Path
    checkpoint: Path
    meta_step: int
    tensors: int
    is_new: bool


def export_network(folder: Path, which: Literal["best", "last"], out: Path) -> Export:
    """Write the parameters of a run's network to a file, and its class and origin to YAML beside it.

    Names are those of the network's own `state_dict`. Tied parameters are stored under each name.

    Args:
        folder: The run's folder.
        which: The checkpoint: `best`, or the last one if nothing was validated; or `last`.
        out: The file, which ends in `.safetensors` or `.pt`.

    Raises:
        UserError: The name of the file is wrong, the folder is not a run's, the checkpoint is missing or
            damaged, a tensor cannot be stored, or another export exists.
    """
    check_export_path(out)
    checkpoint = checkpoint_of_run(folder, which)
    try:
        run = read_run_folder(folder, unlogged=True)
    except UnreadableRunError as error:
        raise UserError(f"run {folder} cannot be read: {error}") from error
    state = load_checkpoint(checkpoint)
    tensors = network_tensors(state["state_dict"], checkpoint)
    config = out.with_suffix(".yaml")
    rates = learned_rates(state)
    contents = {
        out: _serialized(tensors, out),
        config: _description(run, checkpoint, state["global_step"], rates).encode(),
    }
    for path, content in contents.items():
        _check_free(path, content)
    make_folder(out.parent, "OUT")
    missing = [path for path in contents if not path.exists()]
    for path in missing:
        write_atomically(path, contents[path])
    return Export(out, config, checkpoint, state["global_step"], len(tensors), bool(missing))


def check_export_path(out: Path) -> None:
    """Check the name of the file to write.

    Raises:
        UserError: It has another suffix, or is a folder.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"OUT {out} must end in {' or '.join(SUFFIXES)}, which selects the format")
    if out.is_dir():
        raise UserError(f"OUT {out} is a folder; name a file")


def network_tensors(state: Mapping[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """Return the network's part of a checkpoint's `state_dict`, with the network's own names.

    Each tensor is a contiguous copy, so that neither tied parameters nor views share storage.

    Args:
        state: The `state_dict` of a `MetaLearner`.
        checkpoint: Its file, for the message.

    Raises:
        UserError: It has no network.
    """
    found = {
        name.removeprefix(NETWORK): tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name.startswith(NETWORK)
    }
    if not found:
        raise UserError(f"checkpoint {checkpoint} has no network; name a run of maml fit")
    return found


def learned_rates(checkpoint: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """Return the learned inner learning rates by parameter name, one for each inner step, if any."""
    rates = checkpoint["state_dict"].get(RATES)
    if rates is None:
        return None
    return dict(zip(checkpoint[RATE_NAMES], rates.tolist(), strict=True))


def _serialized(tensors: dict[str, Tensor], out: Path) -> bytes:
    if out.suffix == ".pt":
        buffer = BytesIO()
        torch.save(tensors, buffer)
        return buffer.getvalue()
    try:
        return to_safetensors(tensors, {"format": "pt"})
    # Safetensors has no dtype such as complex128, and no sparse tensors.
    except (SafetensorError, KeyError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"OUT {out}: safetensors cannot store the network ({first_line(error)}); export it to "
            f"{out.with_suffix('.pt')}"
        ) from error


def _description(
    run: Run, checkpoint: Path, meta_step: int, rates: dict[str, list[float]] | None
) -> str:
    """Return the text of the YAML file."""
    model = run.config["model"]
    if not isinstance(model.get("network"), dict) or "class_path" not in model["network"]:
        raise UserError(f"run {run.folder} has a config without model.network.class_path; name another")
    result = run.result
    is_tested = result is not None and result.split == "test"
    measured = None
    if result is not None and is_tested and checkpoint == checkpoint_to_test(run.source):
        measured = {
            "measure": f"test/{run.measure}",
            "mean": finite(result.mean),
            "ci95": finite(result.ci95),
        }
    content: dict[str, Any] = {
        "network": model["network"],
        "adaptation": {key: model.get(key) for key in ADAPTATION} | {"learned_inner_lr": rates},
        "tasks": run.config["data"].get("tasks"),
        "source": {
            "run": display_path(run.source),
            "checkpoint": checkpoint.name,
            "meta_step": meta_step,
            "experiment": run.experiment,
            "order": str(run.order),
            "seed": run.seed,
            "result": measured,
        },
    }
    return HEADER + yaml.safe_dump(content, sort_keys=False)


def _check_free(path: Path, content: bytes) -> None:
    """Refuse to replace a file with another content."""
    try:
        existing = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another file") from error
    if existing != content:
        raise UserError(f"{path} exists and is not this export; name another file, or remove it first")
