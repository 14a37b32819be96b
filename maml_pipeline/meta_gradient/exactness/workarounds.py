"""How an engine calls a network whose derivatives would otherwise be wrong or missing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from maml_pipeline.meta_gradient.exactness.preservation import preserve_attributes
from maml_pipeline.meta_gradient.fixed_prefix import FixedPrefix
from maml_pipeline.meta_gradient.inner_loop import Loss


class Workarounds(NamedTuple):
    """The special treatment that a network and its loss need; `verified_workarounds` finds it.

    Args:
        copy_inputs: The network or the loss changes its input in place: pass a copy.
        math_attention: Fused attention has no second derivative: run PyTorch's math kernel instead.
        mask_padding: vmap ignores the `padding_idx` of embeddings: use `PaddingMask`.
        preserve_attributes: A call assigns attributes of the network: restore them.
        fixed_prefix: What the network computes before any adapted parameter takes part: compute it once
            for all inner steps. For engine vectorized only.
        bypass_clones: learn2learn's clones do not replace each use of a parameter: call the network
            with each step's parameters instead. For engine learn2learn only.
    """

    copy_inputs: bool = False
    math_attention: bool = False
    mask_padding: bool = False
    preserve_attributes: bool = False
    fixed_prefix: FixedPrefix = FixedPrefix()
    bypass_clones: bool = False

    def evaluate(
        self, call: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of one support or query set and the prediction `(S, ...)`."""
        if self.copy_inputs:
            x, y = x.clone(), y.clone()
        with self._kernels():
            prediction = call(x)
        return loss(prediction, y), prediction

    def predict(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the prediction without the loss."""
        with self._kernels():
            return call(x.clone() if self.copy_inputs else x)

    def preserved_attributes(self, network: nn.Module) -> AbstractContextManager[object]:
        """Return a context that restores the network's attributes, if calls assign any."""
        return preserve_attributes([*network.modules()]) if self.preserve_attributes else nullcontext()

    def _kernels(self) -> AbstractContextManager[object]:
        if not (self.math_attention or self.mask_padding):
            return nullcontext()
        contexts = ExitStack()
        if self.math_attention:
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.mask_padding:
            contexts.enter_context(PaddingMask())
        return contexts


class PaddingMask(TorchFunctionMode):
    """Give embeddings with `padding_idx` the right derivative under `torch.func.vmap`.

    The padding row has no gradient. vmap's rule for `torch.embedding` ignores that. Here the row is
    detached, which is equivalent to any order.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is embedding:
            names = ("input", "weight", "padding_idx")
            kwargs |= dict(zip(names, args[:3], strict=False))
            args, padding = args[3:], kwargs.pop("padding_idx", None)
            if args:  # max_norm, norm_type, scale_grad_by_freq, sparse
                rest = ("max_norm", "norm_type", "scale_grad_by_freq", "sparse")
                kwargs |= dict(zip(rest, args, strict=False))
            if padding is not None:
                kwargs["weight"] = _without_gradient_of_row(kwargs["weight"], padding)
            return function(**kwargs)
        if function is torch.embedding and len(args) > 2 and args[2] >= 0:
            weight, input, padding, *others = args
            return function(_without_gradient_of_row(weight, padding), input, -1, *others, **kwargs)
        return function(*args, **kwargs)


def _without_gradient_of_row(weight: Tensor, row: int) -> Tensor:
    rows = torch.arange(weight.shape[0], device=weight.device)
    is_padding = (rows == row % weight.shape[0])[:, None]
    return torch.where(is_padding, weight.detach(), weight)
