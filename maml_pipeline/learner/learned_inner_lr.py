"""Learned inner learning rates: one for each adapted parameter and inner step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.limits import check_positive
from maml_pipeline.meta_gradient import InnerLoop

RATES = "inner_rates"
"""Name of the rates `(parameters, steps)` in the `state_dict` of a checkpoint."""
RATE_NAMES = "inner_rate_names"
"""Key of a checkpoint with the names of the parameters that they move, in the order of their rows."""


@dataclass
class LearnedInnerLr:
    """Meta-learn the inner learning rates beside the initial parameters.

    There is one rate for each adapted parameter tensor and inner step of training; all start at
    `inner_lr`. They are free, as in the paper: a rate may become negative, with which an inner step
    ascends.

    Args:
        lr: Outer learning rate of the rates, above 0. The optimizer's own one moves the network alone.

    Raises:
        UserError: `lr` is out of range.

    References:
        Antoniou, Edwards, Storkey, "How to train your MAML", 2019, section 4 (per-layer per-step
        learning rates); Li, Zhou, Chen, Li, "Meta-SGD", 2017 (a rate for each weight).
    """

    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("learned_inner_lr.lr", self.lr)


def initial_rates(inner: InnerLoop, names: Sequence[str], dtype: torch.dtype) -> nn.Parameter:
    """Return the rates `(parameters, steps)` before training.

    Raises:
        UserError: There are no inner steps.
    """
    if inner.steps == 0:
        raise UserError("learned_inner_lr is set, but inner_steps is 0; set it to 1 or more")
    return nn.Parameter(torch.full((len(names), inner.steps), inner.lr, dtype=dtype))


def check_same_rates(saved: Sequence[str], own: Sequence[str]) -> None:
    """Reject the learned rates of other parameters, or in another order: they are saved by row.

    Args:
        saved: The names of the parameters that the rates of a checkpoint move.
        own: The names of those that the rates here move.

    Raises:
        UserError: They differ; the message gives the first.
    """
    for there, here in zip_longest(saved, own, fillvalue="none"):
        if there != here:
            raise UserError(
                f"the checkpoint's learned inner learning rates are those of {there}, where here {here} "
                "adapts; use the config and the network's code with which it was trained"
            )


def parameter_groups(
    parameters: Iterable[Tensor], rates: Tensor | None, settings: LearnedInnerLr | None
) -> Any:
    """Return what an optimizer is built from: the network's parameters, and the rates with their own lr.

    Weight decay would pull the rates to zero, so they have none.
    """
    if rates is None or settings is None:
        return parameters
    own = {"params": [rates], "lr": settings.lr, "weight_decay": 0.0}
    return [{"params": [*parameters]}, own]


def mean_rates(rates: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Average the rates over the steps and parameters of each layer, and over all under `""`."""
    layers: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        layers.setdefault(name.rpartition(".")[0], []).append(row)
    means = {layer: rates[rows].mean() for layer, rows in layers.items()}
    return means | {"": rates.mean()}
