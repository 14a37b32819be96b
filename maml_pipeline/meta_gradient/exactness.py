"""Every engine is held to plain autograd when it first meets a network: right, or refused by name.

An engine calls a network with parameters that are not the network's own, and vmap computes with rules
of its own. Most networks do not notice; some do, and would train on a wrong gradient without a word.
So the first time that an engine meets a network, a loss, a mode (training or evaluation), an order and
shapes of tasks, it computes two tasks its own way, in float64, near the initial parameters, and so does
`ByHand`: losses and meta-gradient have to agree. Second derivatives are held to finite differences of
first ones besides.

It happens once a run and costs about as much as a meta-step or two; docs/performance.md has figures.
"""

import copy
import logging
import sys
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import FrameType
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.handling import Handling
from maml_pipeline.meta_gradient.identity import Identity
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, trainable_parameters
from maml_pipeline.meta_gradient.observation import (
    Observation,
    check_copy,
    check_initialised,
    check_storage,
    check_twice_differentiable,
    observe,
)
from maml_pipeline.meta_gradient.preserved import borrowed, random_state_restored
from maml_pipeline.meta_gradient.trial import Fault, Trial, Way, reason
from maml_pipeline.tasks import TaskBatch

logger = logging.getLogger(__name__)

_TASKS = 2
_verified: "WeakKeyDictionary[nn.Module, dict[Hashable, Handling]]" = WeakKeyDictionary()


def verified_handling(
    way: Way, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop
) -> Handling:
    """Return how this way has to call the network to be exact; found out once and remembered.

    Raises:
        UserError: It is not exact in any way that is known, and what to do instead.
    """
    key = (
        *(way.engine, way.evaluates, network.training, Identity(loss), *trainable_parameters(network)),
        *(inner.first_order, inner.checkpointed, inner.steps > 0, batch.support_x.device),
        *((tensor.shape[1:], tensor.dtype) for tensor in batch),
    )
    handlings = _verified.setdefault(network, {})
    if key not in handlings:
        handlings[key] = _verify(way, network, loss, batch, inner)
    return handlings[key]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and every module back into its own."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _verify(way: Way, network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> Handling:
    check_initialised(network)
    if not way.evaluates:
        check_twice_differentiable(network, inner)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        random_state_restored(batch.support_x.device),
    ):
        # Tensors made under inference mode cannot be differentiated; their clones can.
        tasks = TaskBatch(*(tensor[:_TASKS].detach().clone() for tensor in batch))
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "None of the inputs have requires_grad")
        handling = Handling()
        try:
            task = next(iter(tasks.tasks()))
            seen = observe(network, loss, task)
            if seen.draws_random_numbers and way.random_remedy is not None:
                name = type(network).__name__
                raise UserError(
                    f"the network {name} draws random numbers, as dropout does: {way.random_remedy}"
                )
            check_storage(network, loss, task)
            handling = _first_handling(way, network, inner, seen)
            return _hold(way, network, loss, tasks, inner, handling, seen)
        except UserError:
            raise
        except torch.OutOfMemoryError:
            logger.warning("engine %s was not held to plain autograd, for want of memory", way.engine)
            return handling
        except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
            raise _undifferentiable(network, inner, error) from error


def _first_handling(way: Way, network: nn.Module, inner: InnerLoop, seen: Observation) -> Handling:
    is_second_order = not (way.evaluates or inner.first_order or inner.steps == 0)
    math_attention = seen.fused_attention and is_second_order
    if math_attention:
        logger.info(
            "second order through the attention of network %s: PyTorch's math kernel runs instead of "
            "the fused one, which has no second derivative",
            type(network).__name__,
        )
    return Handling(
        copies_tasks=seen.changes_tasks,
        math_attention=math_attention,
        masks_padding=seen.pads and way.maps_tasks,
        restores_attributes=seen.leaves_values,
    )


def _undifferentiable(network: nn.Module, inner: InnerLoop, error: Exception) -> UserError:
    name, cause = type(network).__name__, reason(error)
    if "use_reentrant" in cause or "None of the inputs" in cause:
        remedy = "call torch.utils.checkpoint with use_reentrant=False, or not at all"
    elif "not implemented" in cause:
        remedy = "replace that layer" + ("" if inner.first_order else ", or set first_order to true")
    else:
        return UserError(f"network {name} or its loss cannot be trained: {cause}")
    order = f"first_order {str(inner.first_order).lower()}"
    return UserError(f"PyTorch cannot differentiate network {name} with {order}: {cause}; {remedy}")


def _hold(
    way: Way,
    network: nn.Module,
    loss: Loss,
    tasks: TaskBatch,
    inner: InnerLoop,
    handling: Handling,
    seen: Observation,
) -> Handling:
    """Hold the engine to plain autograd in float64, or in the network's type where it has to be."""
    handlings = [handling]
    if way.clones:
        handlings.append(handling._replace(calls_network=True))
    for dtype in (torch.float64, None):
        try:
            with _subject(network, loss, tasks, dtype) as subject:
                trial = Trial(way, subject, loss, _cast(tasks, dtype), inner, handling)
                if dtype is not None and trial.second_derivative_is_wrong():
                    _report_second_derivative(network, seen)
                faults: list[Fault] = []
                for candidate in handlings:
                    fault = trial.fault(candidate)
                    if fault is None:
                        if candidate.calls_network:
                            logger.info(
                                "learn2learn's clones do not see every layer of network %s: it is "
                                "called with each step's parameters instead",
                                type(network).__name__,
                            )
                        return candidate
                    faults.append(fault)
            raise UserError(_refusal(way, network, loss, tasks, faults[0]))
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a network that is made for one type may meet in another
            if dtype is None:
                raise
            logger.debug("not held to plain autograd in float64: %s", error)
    raise AssertionError  # the network's own type either agrees or raises


@contextmanager
def _subject(
    network: nn.Module, loss: Loss, tasks: TaskBatch, dtype: torch.dtype | None
) -> Iterator[nn.Module]:
    """Borrow the network, or a copy where its parameters may not change their type.

    PyTorch's DDP holds on to each parameter's gradient accumulator, which a parameter loses with its
    type.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    subject = copy.deepcopy(network) if is_distributed and dtype is not None else network
    if subject is not network:
        check_copy(network, subject, loss, next(iter(tasks.tasks())))
    with borrowed(subject, loss, dtype=dtype), torch.autocast(_device(network).type, enabled=False):
        yield subject


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _cast(tasks: TaskBatch, dtype: torch.dtype | None) -> TaskBatch:
    if dtype is None:
        return tasks
    return TaskBatch(*(t.to(dtype) if t.is_floating_point() else t for t in tasks))


def _report_second_derivative(network: nn.Module, seen: Observation) -> None:
    name = type(network).__name__
    if seen.stops_gradients:
        logger.warning(
            "network %s or its loss stops gradients (detach, no_grad or an autograd.Function): its "
            "second derivative is not that of its values, and is taken as it is written",
            name,
        )
        return
    raise UserError(
        f"the second derivative of network {name} or its loss is wrong in PyTorch {torch.__version__}: "
        "it differs from finite differences of the first; set first_order to true, or write the layer "
        "with other operations"
    )


def _refusal(way: Way, network: nn.Module, loss: Loss, tasks: TaskBatch, fault: Fault) -> str:
    name = type(network).__name__
    if fault.error is not None:
        many = " on many tasks at once" if way.maps_tasks else ""
        return (
            f"engine {way.engine} cannot run the network {name} or its loss{many}: {fault.error}; "
            f"{way.error_remedy}"
        )
    what = "query losses after an inner step" if way.evaluates else "meta-gradient"
    differs = (
        f"engine {way.engine} would take a wrong {what} for network {name}, "
        f"{100 * fault.difference:.3g} % off plain autograd's{fault.where}"
    )
    if _recomputes(network, loss, tasks):
        return (
            f"{differs}: its activations are recomputed (torch.utils.checkpoint) after its parameters "
            "have moved on; leave that out (checkpoint_inner_steps saves memory across inner steps)"
        )
    return f"{differs}: {way.remedy}"


def _recomputes(network: nn.Module, loss: Loss, tasks: TaskBatch) -> bool:
    """Say whether the network runs through `torch.utils.checkpoint`."""
    seen = False

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        seen |= frame.f_code.co_filename == torch.utils.checkpoint.__file__

    profiler = sys.getprofile()
    with borrowed(network, loss):
        sys.setprofile(watch)
        try:
            network(tasks.support_x[0].clone())
        finally:
            sys.setprofile(profiler)
    return seen
