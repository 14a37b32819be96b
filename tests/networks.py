"""Networks and tasks on which the engines are compared with each other."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.meta_gradient import InnerLoop, Loss, MetaGradient
from maml_pipeline.networks import MLP, ConvNet
from maml_pipeline.tasks import TaskBatch


def smooth(convolutional: nn.Module) -> nn.Module:
    """Replace ReLU by softplus, which is smooth."""
    for name, module in convolutional.named_children():
        if isinstance(module, nn.ReLU):
            setattr(convolutional, name, nn.Softplus())
        smooth(module)
    return convolutional


def batch_norm_network() -> nn.Module:
    """Build a network as a user might: PyTorch's batch normalisation, ReLU in place, average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)),
        *(nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        *(nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 49, 3)),
    )


def group_and_layer_norm_network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Softplus()),
        *(nn.AvgPool2d(2), nn.LayerNorm([4, 7, 7]), nn.Flatten(), nn.Linear(4 * 49, 3)),
    )


IMAGE_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: ConvNet(ways=3, filters=4),
    "max_pool": lambda: ConvNet(ways=3, filters=4, downsampling="max_pool"),
    "flattened": lambda: ConvNet(ways=3, filters=4, image_size=28),
    "batch_norm": batch_norm_network,
    "group_and_layer_norm": group_and_layer_norm_network,
}
VECTOR_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2, 1),
    "relu": lambda: MLP(2, 1, (8, 8)),
    "tanh": lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)),
}
SMOOTH_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh": VECTOR_NETWORKS["tanh"],
    "strided": lambda: smooth(ConvNet(ways=3, filters=4)),
    "group_and_layer_norm": group_and_layer_norm_network,
    "batch_norm": lambda: smooth(batch_norm_network()),
}


def case(name: str, build: Callable[[], nn.Module], tasks: int) -> tuple[nn.Module, Loss, TaskBatch]:
    """Build a float64 network, its loss and T random tasks that fit it."""
    torch.manual_seed(len(name))
    network = build().double()
    if name in IMAGE_NETWORKS:
        x = torch.rand(2, tasks, 6, 1, 28, 28, dtype=torch.float64)
        y = torch.arange(3).repeat(tasks, 2)
        return network, cross_entropy, TaskBatch(x[0], y, x[1], y)
    x, target = torch.randn(2, tasks, 6, 2).double(), torch.randn(2, tasks, 6, 1).double()
    return network, mse_loss, TaskBatch(x[0], target[0], x[1], target[1])


def inner_loop(order: str, lr: float, steps: int) -> InnerLoop:
    """Build the inner loop of a gradient order by its name, such as `truncated-2-checkpointed`."""
    parsed = GradientOrder.parse(order)
    return InnerLoop(lr, steps, parsed.first_order, parsed.differentiated_steps, parsed.method)


def relative_difference(actual: MetaGradient, expected: MetaGradient) -> float:
    """Return the largest relative difference of a parameter's gradient."""
    return largest_relative_difference(actual.gradient, expected.gradient)


def largest_relative_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference of two tensors of one name.

    Norms below a thousandth of the largest one count as that thousandth.
    """
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    differences = [
        ((actual[name] - value).norm() / torch.clamp(value.norm(), min=1e-3 * largest)).item()
        for name, value in expected.items()
    ]
    return float(max(differences))


def flatten(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])
