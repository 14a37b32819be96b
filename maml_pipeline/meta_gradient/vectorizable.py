"""Which networks can be mapped over tasks: the others are refused, by name and with the remedy."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.adaptation import GroupLoss, expand
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, trainable_parameters
from maml_pipeline.tasks import TaskBatch

REMEDY = "use engine learn2learn, which runs any module"


def check_vectorizable(network: nn.Module, group_loss: GroupLoss, batch: TaskBatch) -> None:
    """Try the network on two tasks at once.

    Raises:
        UserError: It keeps running statistics, or does what vmap cannot, such as dropout.
    """
    name = type(network).__name__
    check_repeatable(network, batch, remedy=REMEDY)
    tasks = TaskBatch(*(tensor[:2] for tensor in batch))
    theta = expand(trainable_parameters(network), len(tasks.support_x))
    try:
        with torch.no_grad():
            losses, _ = group_loss(theta, tasks.support_x, tasks.support_y)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"engine vectorized cannot run the network {name} or its loss on many tasks at once: "
            f"{reason}; {REMEDY}"
        ) from error
    if losses.shape != (len(tasks.support_x),):
        raise UserError(
            f"the loss of one task is {tuple(losses.shape[1:])}; it must be a scalar, so give the "
            "loss a reduction"
        )


def check_twice_differentiable(network: nn.Module, inner: InnerLoop) -> None:
    """Refuse second order through PyTorch's weight normalisation, whose second derivative is wrong.

    (`torch._weight_norm` fails `torch.autograd.gradgradcheck` in PyTorch 2.15.)

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


def check_repeatable(network: nn.Module, batch: TaskBatch, remedy: str) -> None:
    """Run a copy of the network twice on one task, and see that nothing has changed.

    Raises:
        UserError: It draws random numbers, or changes its buffers, and what to do instead.
    """
    name, network = type(network).__name__, copy.deepcopy(network)
    buffers = {buffer: value.clone() for buffer, value in network.named_buffers()}
    devices = [batch.support_x.device] if batch.support_x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        before = _random_states(devices)
        network(batch.support_x[0])
        after = _random_states(devices)
    for buffer, value in network.named_buffers():
        if not torch.equal(value, buffers[buffer]):
            raise UserError(
                f"the network {name} changes its buffer {buffer} as it runs, and so does not treat "
                "every task alike: give normalisation layers track_running_stats=False (MAML "
                f"normalises each set by itself), or {remedy}"
            )
    if not all(map(torch.equal, before, after)):
        raise UserError(f"the network {name} draws random numbers, as dropout does: {remedy}")


def _random_states(devices: list[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
