"""`torch.compile` of a whole meta-gradient: inner loop, both derivatives, and the mean over tasks."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from maml_pipeline.meta_gradient.adaptation import GroupLoss
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Parameters
from maml_pipeline.meta_gradient.task_group import GroupGradient, group_gradient
from maml_pipeline.tasks import TaskBatch


class CompiledGroupGradient:
    """`group_gradient`, compiled once for each gradient order and each shape of the tasks.

    Autograd and vmap are traced away first, so that the compiler sees plain tensor operations. The
    trace is made without data: a network whose path depends on its values cannot be compiled. What
    cannot be compiled runs as it is, after one warning.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., GroupGradient]] = {}
        self._failed = False

    def __call__(
        self, group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop
    ) -> GroupGradient:
        """See `group_gradient`."""
        device = batch.support_x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = ((t.shape, t.dtype, t.device) for t in (*batch, *theta.values()))
        key = (group_loss, inner, autocast, *shapes)
        if key not in self._compiled and not self._failed:
            try:
                compiled = torch.compile(_trace(group_loss, theta, batch, inner))
                with torch.no_grad():
                    result = compiled(theta, *batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler may meet
                self._failed = True
                reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
                warnings.warn(
                    f"compile: true did not succeed, so it runs uncompiled: {reason}", stacklevel=2
                )
            else:
                self._compiled[key] = compiled
                return GroupGradient(*result)
        if key not in self._compiled:
            return group_gradient(group_loss, theta, batch, inner)
        with torch.no_grad():
            return GroupGradient(*self._compiled[key](theta, *batch))


def _trace(group_loss: GroupLoss, theta: Parameters, batch: TaskBatch, inner: InnerLoop) -> GraphModule:
    def function(theta: Parameters, *batch: Tensor) -> tuple[Any, ...]:
        return tuple(group_gradient(group_loss, theta, TaskBatch(*batch), inner))

    return make_fx(function, tracing_mode="fake")(theta, *batch)
