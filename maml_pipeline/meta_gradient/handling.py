"""What a network needs, beyond a plain call, for its derivatives to be exact."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from maml_pipeline.meta_gradient.inner_loop import Loss
from maml_pipeline.meta_gradient.preserved import attributes_restored


class Handling(NamedTuple):
    """How an engine calls one network with one loss; `exactness` finds out what is needed.

    Args:
        copies_tasks: The network or the loss changes its input in place: give it a copy.
        math_attention: A second derivative is taken of fused attention, which has none: run
            PyTorch's math kernel instead.
        masks_padding: An embedding with `padding_idx` is mapped over tasks; see `PaddingMask`.
        restores_attributes: A call leaves values in attributes of the network: put them back.
        calls_network: For engine learn2learn: its clones do not see every use of a parameter, so
            call the network itself with each step's parameters.
    """

    copies_tasks: bool = False
    math_attention: bool = False
    masks_padding: bool = False
    restores_attributes: bool = False
    calls_network: bool = False

    def evaluate(
        self, call: Callable[[Tensor], Tensor], loss: Loss, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of one set and its prediction `(S, ...)`."""
        if self.copies_tasks:
            x, y = x.clone(), y.clone()
        with self._kernels():
            prediction = call(x)
        return loss(prediction, y), prediction

    def predict(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the prediction alone."""
        with self._kernels():
            return call(x.clone() if self.copies_tasks else x)

    def restored(self, network: nn.Module) -> AbstractContextManager[object]:
        """Put attributes of the network back where a call would leave values in them."""
        return attributes_restored([*network.modules()]) if self.restores_attributes else nullcontext()

    def _kernels(self) -> AbstractContextManager[object]:
        if not (self.math_attention or self.masks_padding):
            return nullcontext()
        contexts = ExitStack()
        if self.math_attention:
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.masks_padding:
            contexts.enter_context(PaddingMask())
        return contexts


class PaddingMask(TorchFunctionMode):
    """Give embeddings with `padding_idx` a derivative that `torch.func.vmap` keeps.

    The padding row has no gradient. vmap's rule for `torch.embedding` loses that; here the row is
    detached instead, which is the same to any order.
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


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Switch off the inference kernel of `nn.TransformerEncoderLayer`, which vmap cannot map.

    PyTorch takes it in evaluation mode without gradients.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
