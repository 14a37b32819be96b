"""Verify once per network that an engine is exact, or raise an error that says why it is not."""

import copy
import logging
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import Method
from maml_pipeline.meta_gradient.exactness.comparison import (
    Comparison,
    Computation,
    Mismatch,
    first_sentence,
)
from maml_pipeline.meta_gradient.exactness.hessian_free_error import warn_if_inexact
from maml_pipeline.meta_gradient.exactness.inspection import NetworkTraits, inspect_network
from maml_pipeline.meta_gradient.exactness.layers import check_initialised, check_twice_differentiable
from maml_pipeline.meta_gradient.exactness.preservation import preserve_random_state, preserve_state
from maml_pipeline.meta_gradient.exactness.storage import check_copy, check_storage
from maml_pipeline.meta_gradient.exactness.workarounds import Workarounds
from maml_pipeline.meta_gradient.fixed_prefix import FixedPrefix, find_fixed_prefix
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, adapted_names, trainable_parameters
from maml_pipeline.tasks import TaskBatch
from maml_pipeline.torch_internals import (
    REENTRANT_CHECKPOINT_WARNING,
    is_missing_derivative_error,
    is_reentrant_checkpoint_error,
    uses_activation_checkpointing,
)

logger = logging.getLogger(__name__)

_TASKS = 2
# The loss is stored too: its id is part of the key, and must not be reused.
Verified = dict[Hashable, tuple[Workarounds, Loss]]
verified_networks: "WeakKeyDictionary[nn.Module, Verified]" = WeakKeyDictionary()


def verified_workarounds(
    computation: Computation, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
) -> Workarounds:
    """Return the workarounds with which a computation is exact; verified once, then cached.

    Raises:
        UserError: The computation is not exact with any known workaround; the message names a remedy.
    """
    key = (
        *(computation.engine, computation.is_evaluation, id(loss)),
        # The attribute p is the probability of a dropout.
        *((type(layer), layer.training, vars(layer).get("p")) for layer in network.modules()),
        *trainable_parameters(network),
        *(inner.is_first_order, inner.first_differentiated_step > 0, inner.method, inner.steps > 0),
        *(inner.adapt, inner.rates is None),
        batch.support_x.device,
        *((tensor.shape[1:], tensor.dtype) for tensor in batch),
    )
    verified = verified_networks.setdefault(network, {})
    if key not in verified:
        verified[key] = _verify(computation, network, loss, batch, inner), loss
    return verified[key][0]


def derivative_error(network: nn.Module, inner: InnerLoop, error: Exception) -> UserError | None:
    """Explain an error of PyTorch about a derivative that it cannot compute; `None` for any other."""
    cause = first_sentence(error)
    if is_reentrant_checkpoint_error(cause):
        remedy = "call torch.utils.checkpoint with use_reentrant=False, or not at all"
    elif is_missing_derivative_error(cause):
        other_orders = ", or set method to hessian_free or first_order to true"
        remedy = "replace that layer" + (other_orders if inner.needs_second_derivatives else "")
    else:
        return None
    return UserError(
        f"PyTorch cannot differentiate network {type(network).__name__} with first_order "
        f"{str(inner.first_order).lower()}: {cause}; {remedy}"
    )


def _verify(
    computation: Computation, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
) -> Workarounds:
    check_initialised(network)
    if not computation.is_evaluation:
        check_twice_differentiable(network, inner)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        preserve_random_state(batch.support_x.device),
    ):
        # Autograd cannot differentiate inference tensors, but it can differentiate their clones.
        tasks = TaskBatch(*(tensor[:_TASKS].detach().clone() for tensor in batch))
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", REENTRANT_CHECKPOINT_WARNING)
        workarounds = Workarounds()
        try:
            task = next(iter(tasks.tasks()))
            traits = inspect_network(network, loss, task)
            if traits.draws_random_numbers and computation.random_remedy is not None:
                raise UserError(
                    f"network {type(network).__name__} draws random numbers, as dropout does: "
                    f"{computation.random_remedy}"
                )
            check_storage(network, loss, task)
            workarounds = _needed_workarounds(computation, network, inner, traits)
            if computation.uses_vmap and not computation.is_evaluation:
                with preserve_state(network):
                    adapted = adapted_names(network, inner.adapt)
                    prefix = find_fixed_prefix(network, adapted, task.support_x)
                workarounds = workarounds._replace(fixed_prefix=prefix)
            workarounds = _compare(computation, network, loss, tasks, inner, workarounds, traits)
            if inner.method is Method.HESSIAN_FREE and not computation.is_evaluation:
                warn_if_inexact(computation, network, loss, tasks, inner, workarounds)
            return workarounds
        except UserError:
            raise
        except torch.OutOfMemoryError:
            logger.warning(
                "engine %s was not compared with plain autograd: out of memory", computation.engine
            )
            return workarounds
        except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
            name, cause = type(network).__name__, first_sentence(error)
            raise derivative_error(network, inner, error) or UserError(
                f"network {name} or its loss cannot be trained: {cause}"
            ) from error


def _needed_workarounds(
    computation: Computation, network: nn.Module, inner: InnerLoop, traits: NetworkTraits
) -> Workarounds:
    is_differentiated_twice = inner.needs_second_derivatives and not computation.is_evaluation
    math_attention = traits.fused_attention and is_differentiated_twice
    if math_attention:
        logger.info(
            "second order through the attention of network %s: using PyTorch's math kernel, since the "
            "fused one has no second derivative",
            type(network).__name__,
        )
    return Workarounds(
        copy_inputs=traits.changes_inputs,
        math_attention=math_attention,
        mask_padding=traits.has_padding and computation.uses_vmap,
        preserve_attributes=traits.changes_attributes,
    )


def _compare(
    computation: Computation,
    network: nn.Module,
    loss: Loss,
    tasks: TaskBatch,
    inner: InnerLoop,
    workarounds: Workarounds,
    traits: NetworkTraits,
) -> Workarounds:
    """Compare with plain autograd in float64, or in the network's own type if float64 fails."""
    candidates = [workarounds]
    if computation.uses_clones:
        candidates.append(workarounds._replace(bypass_clones=True))
    if workarounds.fixed_prefix.recorded:
        candidates.append(workarounds._replace(fixed_prefix=FixedPrefix()))
    for dtype in (torch.float64, None):
        try:
            with _temporary_network(network, loss, tasks, dtype) as subject:
                comparison = Comparison(
                    computation, subject, loss, _cast(tasks, dtype), inner, workarounds
                )
                if dtype is not None and comparison.second_derivative_is_wrong():
                    _report_second_derivative(network, inner, traits)
                mismatches: list[Mismatch] = []
                for candidate in candidates:
                    mismatch = comparison.mismatch(candidate)
                    if mismatch is None:
                        if candidate.bypass_clones:
                            logger.info(
                                "learn2learn's clones do not replace every layer of network %s: calling "
                                "the network with each step's parameters instead",
                                type(network).__name__,
                            )
                        return candidate
                    mismatches.append(mismatch)
            reported = mismatches[0 if computation.uses_clones else -1]
            raise UserError(_mismatch_message(computation, network, loss, tasks, reported))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a network written for one type may raise any error in another
            if dtype is None:
                raise
            if inner.method is Method.HESSIAN_FREE and not computation.is_evaluation:
                raise _needs_double(network, first_sentence(error)) from error
            logger.debug("not compared with plain autograd in float64: %s", error)
    raise AssertionError  # in its own type the network either agrees or raises


def _needs_double(network: nn.Module, cause: str) -> UserError:
    return UserError(
        f"method hessian_free computes differences of gradients in float64, in which network "
        f"{type(network).__name__} or its loss does not run: {cause}; set method to unrolled or "
        "first_order to true"
    )


@contextmanager
def _temporary_network(
    network: nn.Module, loss: Loss, tasks: TaskBatch, dtype: torch.dtype | None
) -> Iterator[nn.Module]:
    """Yield the network within `preserve_state`, or a copy if its type may not change.

    Under DDP it may not: DDP keeps each parameter's gradient accumulator, which a change of type
    replaces.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    subject = copy.deepcopy(network) if is_distributed and dtype is not None else network
    if subject is not network:
        check_copy(network, subject, loss, next(iter(tasks.tasks())))
    device = next(network.parameters()).device
    with preserve_state(subject, loss, dtype=dtype), torch.autocast(device.type, enabled=False):
        yield subject


def _cast(tasks: TaskBatch, dtype: torch.dtype | None) -> TaskBatch:
    if dtype is None:
        return tasks
    return TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in tasks))


def _report_second_derivative(network: nn.Module, inner: InnerLoop, traits: NetworkTraits) -> None:
    name = type(network).__name__
    if inner.method is Method.HESSIAN_FREE:
        raise UserError(
            f"the gradient of network {name} is not that of its loss values, or is rounded more "
            "coarsely than its type, so method hessian_free would compute a wrong meta-gradient: set "
            "method to unrolled or first_order to true"
        )
    if traits.stops_gradients:
        logger.warning(
            "network %s or its loss stops gradients (detach, no_grad or an autograd.Function): second "
            "order uses the derivative that autograd computes, which is not that of the loss values",
            name,
        )
        return
    raise UserError(
        f"the second derivative of network {name} or its loss is wrong in PyTorch {torch.__version__}: "
        "it differs from finite differences of the first; set first_order to true, or write the layer "
        "with other operations"
    )


def _mismatch_message(
    computation: Computation, network: nn.Module, loss: Loss, tasks: TaskBatch, mismatch: Mismatch
) -> str:
    name = type(network).__name__
    if mismatch.error is not None:
        vmap = " under vmap" if computation.uses_vmap else ""
        return (
            f"engine {computation.engine} cannot run network {name} or its loss{vmap}: "
            f"{mismatch.error}; {computation.error_remedy}"
        )
    what = "query losses after an inner step" if computation.is_evaluation else "meta-gradient"
    differs = (
        f"engine {computation.engine} would compute a wrong {what} for network {name}, "
        f"{100 * mismatch.difference:.3g} % off plain autograd's{mismatch.where}"
    )
    with preserve_state(network, loss):
        x = tasks.support_x[0].clone()
        recomputes_activations = uses_activation_checkpointing(lambda: network(x))
    if recomputes_activations:
        return (
            f"{differs}: torch.utils.checkpoint recomputes its activations after the parameters have "
            "changed; leave it out (method checkpointed saves memory across inner steps)"
        )
    return f"{differs}: {computation.remedy}"
