"""Networks that run as machine code, with tasks, and what a test compares."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline.meta_gradient import InnerLoop, Loss, MetaGradient, NativeEngine, VectorizedEngine
from maml_pipeline.meta_gradient.native_engine import known_network
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import TaskBatch

ENGINE = NativeEngine()
REFERENCE = VectorizedEngine()
LOOPS = {
    "no step": InnerLoop(0.1, 0),
    "first order": InnerLoop(0.1, 3, first_order=True),
    "one step": InnerLoop(0.1, 1),
    "unrolled": InnerLoop(0.1, 4),
    "checkpointed": InnerLoop(0.1, 7, method="checkpointed"),
    "truncated": InnerLoop(0.1, 5, differentiated_steps=2),
    "truncated, checkpointed": InnerLoop(0.1, 7, differentiated_steps=5, method="checkpointed"),
    "truncated to nothing": InnerLoop(0.1, 3, differentiated_steps=0, method="checkpointed"),
}
IMAGE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: ConvNet(ways=3, filters=4, in_channels=2),
    "strided, flattened": lambda: ConvNet(ways=3, filters=4, in_channels=2, image_size=19),
    "pooled": lambda: ConvNet(ways=3, filters=4, in_channels=2, downsampling="max_pool"),
    "pooled, flattened": lambda: ConvNet(3, 4, "max_pool", in_channels=2, image_size=19),
}
VECTOR_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(2, 3, (8, 8)),
    "one layer": lambda: nn.Sequential(nn.Linear(2, 3)),
    "layers of unequal widths": lambda: nn.Sequential(
        *(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
    ),
}
NETWORKS = IMAGE_NETWORKS | VECTOR_NETWORKS


def case(
    name: str, loss: Loss, tasks: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, TaskBatch]:
    """Build a network that machine code knows, with tasks of more query than support examples."""
    torch.manual_seed(len(name))
    network = NETWORKS[name]().to(dtype)
    with torch.no_grad():  # away from zero biases
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    shape = (2, 19, 19) if name in IMAGE_NETWORKS else (2,)
    support_x, query_x = (torch.randn(tasks, n, *shape, dtype=dtype) for n in (6, 7))
    if loss is mse_loss:
        support_y, query_y = (torch.randn(tasks, n, 3, dtype=dtype) for n in (6, 7))
    else:
        support_y, query_y = (torch.randint(3, (tasks, n)) for n in (6, 7))
    batch = TaskBatch(support_x, support_y, query_x, query_y)
    assert known_network(network, loss, batch, InnerLoop(0.1)) is not None
    return network, batch


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(result: MetaGradient) -> list[Tensor]:
    return [result.loss, result.inner_losses, *result.gradient.values()]
