"""Measure how far the Hessian-free meta-gradient is from the exact one, before training with it."""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.exactness.comparison import Computation
from maml_pipeline.meta_gradient.exactness.preservation import preserve_state
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters, trainable_parameters
from maml_pipeline.tasks import TaskBatch
from maml_pipeline.torch_internals import uses_weight_normalization

logger = logging.getLogger(__name__)

_NEGLIGIBLE = 0.01
_POINTS = 2


def warn_if_inexact(
    computation: Computation,
    network: nn.Module,
    loss: Loss,
    tasks: TaskBatch,
    inner: InnerLoop,
    workarounds: Workarounds,
) -> None:
    """Warn if the differences of gradients are far from the exact second derivatives.

    The engine computes both, in the network's own type and near the initial parameters, with the same
    inner steps, to the bit. Without a second derivative there is nothing to compare with.

    Args:
        computation: The engine's.
        network: Left unchanged.
        loss: (prediction, target) -> scalar.
        tasks: A few tasks.
        inner: The run's inner loop, with the method `hessian_free`.
        workarounds: Those that the engine needs.
    """
    if any(map(uses_weight_normalization, network.modules())):  # whose second derivative is wrong
        return
    parameters = trainable_parameters(network).values()
    if any(torch.finfo(p.dtype).eps > torch.finfo(torch.float32).eps for p in parameters):
        return  # the exact second derivatives would be rounded as coarsely
    generator, off = torch.Generator().manual_seed(0), 0.0
    workarounds = workarounds._replace(math_attention=True)  # the fused one has no second derivative
    for _ in range(_POINTS):
        autocast = torch.autocast(tasks.support_x.device.type, enabled=False)
        with preserve_state(network, loss), torch.no_grad(), autocast:
            for p in parameters:
                p.copy_(_near(p, generator))
            with torch.enable_grad():
                free = computation.compute(network, loss, tasks, inner, workarounds).gradient
                try:
                    exact = computation.compute(
                        network, loss, tasks, replace(inner, method=Method.CHECKPOINTED), workarounds
                    ).gradient
                except (RuntimeError, NotImplementedError) as error:
                    logger.debug("hessian_free was not compared with exact second order: %s", error)
                    return
        off = max(off, _relative_error(free, exact))
    if off > _NEGLIGIBLE:
        logger.warning(
            "hessian_free: the meta-gradient is up to %.3g %% off exact second order for network %s, as "
            "many kinks, such as those of ReLU at exactly 0, cause; method checkpointed is exact",
            *(100 * off, type(network).__name__),
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
