"""Measure how far the Hessian-free meta-gradient is from the exact one, before training with it."""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.exactness.plain_autograd import PlainAutograd
from maml_pipeline.meta_gradient.exactness.preservation import preserve_state
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters
from maml_pipeline.tasks import TaskBatch
from maml_pipeline.torch_internals import uses_weight_normalization

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 0.01
_POINTS = 8
"""Whether a unit crosses its kink is a matter of chance: at one point it may not."""


def warn_if_inexact(network: nn.Module, loss: Loss, tasks: TaskBatch, inner: InnerLoop) -> None:
    """Warn if the differences of gradients are far from the exact second derivatives.

    Plain autograd computes both, at some points near the initial parameters, in the network's own type.
    Without a second derivative there is nothing to compare with.

    Args:
        network: Left unchanged.
        loss: (prediction, target) -> scalar.
        tasks: A few tasks.
        inner: The run's inner loop, with the method `hessian_free`.
    """
    if any(map(uses_weight_normalization, network.modules())):  # whose second derivative is wrong
        return
    with preserve_state(network, loss):
        workarounds = Workarounds(copy_inputs=True, math_attention=True)
        plain = PlainAutograd(network, loss, workarounds, inner.adapt)
        theta = {name: p.detach().clone() for name, p in plain.parameters.items()}
        generator, off = torch.Generator().manual_seed(0), 0.0
        for _ in range(_POINTS):
            point = {name: _near(p, generator) for name, p in theta.items()}
            try:
                exact = plain.meta_gradient(
                    point, tasks, replace(inner, method=Method.UNROLLED)
                ).gradient
            except (RuntimeError, NotImplementedError) as error:
                logger.debug("hessian_free was not compared with exact second order: %s", error)
                return
            off = max(off, _relative_error(plain.meta_gradient(point, tasks, inner).gradient, exact))
    if off > _NEGLIGIBLE:
        logger.warning(
            "hessian_free: the meta-gradient of a task is up to %.3g %% off exact second order "
            "for network %s in %s, as kinks such as those of ReLU cause; method checkpointed is exact",
            *(100 * off, type(network).__name__, str(next(network.parameters()).dtype)[6:]),
        )


def _near(p: Tensor, generator: torch.Generator) -> Tensor:
    """Move a parameter by a hundredth of its size."""
    noise = torch.randn(p.shape, generator=generator).to(p)
    return p + 0.01 * p.abs().square().mean().sqrt() * noise


def _relative_error(actual: Parameters, exact: Parameters) -> float:
    difference, norm = (
        torch.stack([g.norm().double() for g in gradients]).norm()
        for gradients in ([actual[name] - g for name, g in exact.items()], exact.values())
    )
    return float(difference / norm) if norm > 0 else 0.0
