"""What one call of a network does besides predicting: refused, or handled."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss
from maml_pipeline.meta_gradient.preserved import (
    RandomState,
    attributes_restored,
    borrowed,
    changed_attributes,
    snapshot_attributes,
)
from maml_pipeline.tasks import Task

# Two calls of a network on one input may differ by the rounding of a sum that is taken in any order.
ROUNDING = 1e-5


class Observation(NamedTuple):
    """What was seen while the network and the loss ran once on one task's support set.

    Args:
        changes_tasks: They change their input in place.
        draws_random_numbers: As dropout does.
        fused_attention: Attention runs in a kernel that has no second derivative.
        pads: An embedding has a `padding_idx`.
        leaves_values: A call leaves values in attributes of the network.
        stops_gradients: Some operations are kept from autograd on purpose, by `detach`, `no_grad` or a
            `torch.autograd.Function`.
    """

    changes_tasks: bool
    draws_random_numbers: bool
    fused_attention: bool
    pads: bool
    leaves_values: bool
    stops_gradients: bool


def observe(network: nn.Module, loss: Loss, task: Task) -> Observation:
    """Run the network and the loss on one task, and refuse what no engine can treat alike.

    Raises:
        UserError: A call changes what a later call reads, or the loss is not a scalar.
    """
    name = type(network).__name__
    leaves_values = _check_attributes_read_in_evaluation(network, loss, task)
    with borrowed(network, loss):
        before = {key: value.clone() for key, value in _registered(network).items()}
        x, y = task.support_x.clone(), task.support_y.clone()
        state = RandomState(x.device)
        with _Operations() as operations, _StoppedGradients() as stopped:
            prediction = network(x)
            value = loss(prediction, y)
        changes_tasks, draws = bool(x._version or y._version), not state.is_current()
        _check_registered(network, before)
        if value.shape != ():
            raise UserError(
                f"the loss of one task is {tuple(value.shape)}; it must be a scalar, so give the loss "
                "a reduction"
            )
        with torch.no_grad():
            calls = []
            for _ in range(2):
                state.restore()
                calls.append(_call(network, loss, task))
        if relative_distance(*calls) > ROUNDING:
            raise UserError(
                f"the network {name} or its loss does not repeat itself: called twice on one task it "
                "gives two answers, so it keeps a state of its own; MAML needs a function of parameters "
                "and inputs alone (random numbers may come from torch, numpy.random or random)"
            )
    return Observation(
        changes_tasks,
        draws,
        operations.fused_attention,
        operations.pads,
        leaves_values,
        stopped.seen or operations.without_gradient,
    )


def check_initialised(network: nn.Module) -> None:
    """Refuse lazy layers that have no parameters yet.

    Raises:
        UserError: There is one, and what to do.
    """
    for name, tensor in _registered(network).items():
        if is_lazy(tensor):
            raise UserError(
                f"the network {type(network).__name__} has a lazy layer that has not seen any input, at "
                f"{name}: call the network once on a task's support_x before it is trained"
            )


def initialise_lazy(network: nn.Module, task: Task) -> None:
    """Let lazy layers, such as `nn.LazyLinear`, take their shapes from one task.

    Any other network is left alone. Do this before an optimiser is built.

    Args:
        network: Its lazy layers draw their initial parameters.
        task: One task of the distribution.
    """
    if any(map(is_lazy, _registered(network).values())):
        with torch.no_grad():
            network(task.support_x.clone())


def check_storage(network: nn.Module, loss: Loss, task: Task) -> None:
    """Refuse a network that reads its parameters' storage by another way than the parameters.

    A view or a `.data` that is kept in an attribute follows an optimiser, which writes in place, but
    no engine, which calls the network with other tensors.

    Raises:
        UserError: Its prediction depends on whether parameters are overwritten or replaced.
    """
    with torch.no_grad():
        theta = _perturbed(network)
        state = RandomState(task.support_x.device)
        with borrowed(network):  # replaced
            replaced = _call_at(network, loss, theta, task)
        state.restore()
        saved = [p.detach().clone() for p in network.parameters()]
        with attributes_restored([*network.modules()]):
            try:
                overwritten = _call_at(network, loss, theta, task)
            finally:
                for p, value in zip(network.parameters(), saved, strict=True):
                    p.data.copy_(value)
    if relative_distance(replaced, overwritten) > ROUNDING:
        raise UserError(
            f"the network {type(network).__name__} reads its parameters by a view or a .data that it "
            "made before: read the parameters themselves whenever it is called"
        )


def check_copy(network: nn.Module, duplicate: nn.Module, loss: Loss, task: Task) -> None:
    """Refuse to judge a network by its copy where the copy still refers to the network.

    Raises:
        TypeError: The two differ when their parameters are changed alike.
    """
    with torch.no_grad():
        theta = _perturbed(network)
        state = RandomState(task.support_x.device)
        losses = []
        for subject in (network, duplicate):
            state.restore()
            with borrowed(subject):
                losses.append(_call_at(subject, loss, theta, task))
    if relative_distance(*losses) > ROUNDING:
        raise TypeError("a copy of the network refers to parameters of the network itself")


def check_twice_differentiable(network: nn.Module, inner: InnerLoop) -> None:
    """Refuse second order through PyTorch's weight normalisation, whose second derivative is wrong.

    (`torch._weight_norm` fails `torch.autograd.gradgradcheck` in PyTorch 2.15.) Held to finite
    differences it would be refused as well; here it gets its name and its remedy.

    Raises:
        UserError: The network has such a layer, and the remedy.
    """
    if inner.first_order or inner.steps == 0:
        return
    for name, module in network.named_modules():
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, parametrizations._WeightNorm) or any(
            isinstance(hook, WeightNorm) for hook in hooks
        ):
            raise UserError(
                f"PyTorch's weight normalisation, at {name}, has a wrong second derivative: set "
                "first_order to true, or write the layer as weight_v * (weight_g / norm of weight_v)"
            )


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, and 0 where both are the same not-a-number."""
    if torch.equal(actual.nan_to_num(), expected.nan_to_num()):
        return 0.0
    distance = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(distance.nan_to_num(nan=float("inf")))


def _perturbed(network: nn.Module) -> list[Tensor]:
    """Return parameters a tenth of their size away."""
    generator = torch.Generator().manual_seed(0)
    perturbed = []
    for p in network.parameters():
        size = p.abs().square().mean().sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        perturbed.append(p + 0.1 * size * torch.randn(p.shape, generator=generator).to(p))
    return perturbed


def _call_at(network: nn.Module, loss: Loss, theta: list[Tensor], task: Task) -> Tensor:
    for p, value in zip(network.parameters(), theta, strict=True):
        p.data.copy_(value)
    return _call(network, loss, task)


def _call(network: nn.Module, loss: Loss, task: Task) -> Tensor:
    """Return what can be seen of a call: the prediction and, last, the loss."""
    prediction = network(task.support_x.clone())
    # Before the loss, which may overwrite it.
    seen = prediction.detach().flatten().clone() if isinstance(prediction, Tensor) else None
    value = loss(prediction, task.support_y.clone()).detach().reshape(1)
    return value if seen is None else torch.cat([seen, value.to(seen)])


def _registered(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())


def _check_registered(network: nn.Module, before: dict[str, Tensor]) -> None:
    name = type(network).__name__
    for key, value in _registered(network).items():
        if torch.equal(value, before[key]):
            continue
        if isinstance(value, nn.Parameter):
            raise UserError(
                f"the network {name} changes its parameter {key} as it runs (as an embedding with "
                "max_norm does), which has no derivative: leave that out"
            )
        module = network.get_submodule(key.rpartition(".")[0])
        remedy = "MAML needs a network that treats every task alike: keep no state in buffers"
        if isinstance(module, nn.modules.batchnorm._NormBase):
            remedy = (
                "give normalisation layers track_running_stats=False (MAML normalises each set by "
                "itself, and evaluates so)"
            )
        elif isinstance(module, parametrizations._SpectralNorm) or key.endswith(
            ("weight_u", "weight_v")
        ):
            remedy = (
                "PyTorch's spectral normalisation takes a step of its power iteration at every call: "
                "divide by torch.linalg.matrix_norm(weight, 2) instead"
            )
        raise UserError(f"the network {name} changes its buffer {key} as it runs: {remedy}")


def _check_attributes_read_in_evaluation(network: nn.Module, loss: Loss, task: Task) -> bool:
    """Say whether a call leaves values in attributes, and refuse them where evaluation reads them."""
    state = RandomState(task.support_x.device)

    def evaluate() -> Tensor:
        state.restore()
        with torch.no_grad():
            return _call(network.eval(), loss, task)

    def call() -> list[str]:
        snapshots = snapshot_attributes(network)
        state.restore()
        network(task.support_x.clone())
        return changed_attributes(network, snapshots)

    with borrowed(network):
        changed = call()
    if changed and network.training:
        with borrowed(network):
            before = evaluate()
        with borrowed(network):
            call()
            after = evaluate()
        # Registered buffers are another check's.
        with borrowed(network):
            buffers = [buffer.clone() for buffer in network.buffers()]
            call()
            same = all(map(torch.equal, buffers, network.buffers()))
        if same and relative_distance(after, before) > ROUNDING:
            raise UserError(
                f"the network {type(network).__name__} reads in evaluation what training leaves in its "
                f"attribute {changed[0]}: MAML needs a function of parameters and inputs alone"
            )
    state.restore()
    return bool(changed)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watch the operations that really run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused_attention = self.pads = self.without_gradient = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        self.fused_attention |= "_scaled_dot_product_" in name and "_math" not in name
        if name.startswith(("aten.embedding.", "aten._embedding_bag")):
            padding = args[2] if name.startswith("aten.embedding.") and len(args) > 2 else -1
            self.pads |= padding >= 0
        self.without_gradient |= not torch.is_grad_enabled()
        return function(*args, **(kwargs or {}))


class _StoppedGradients(TorchFunctionMode):
    """Watch for gradients that are stopped by name."""

    STOPPING = (Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen |= function in self.STOPPING
        return function(*args, **(kwargs or {}))
