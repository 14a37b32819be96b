"""Meta-gradients with other libraries, as their users write them, for `benchmark_engines.py`.

Each `*_loop` takes (network, loss, batch, inner) and adds the meta-gradient to `.grad`. The networks
consist of PyTorch's own layers: see `with_native_layers`.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maml_pipeline.meta_gradient import InnerLoop, Loss
from maml_pipeline.meta_gradient.learn2learn_engine import learn2learn_maml
from maml_pipeline.networks.convnet import BatchStatisticsNorm2d
from maml_pipeline.networks.convolution import Convolution2d
from maml_pipeline.tasks import TaskBatch

MetaStep = Callable[[nn.Module, Loss, TaskBatch, InnerLoop], None]


def with_native_layers(network: nn.Module) -> nn.Module:
    """Copy a network and replace this project's layers by PyTorch's own.

    Args:
        network: A network of this project.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, BatchStatisticsNorm2d):
                norm = nn.BatchNorm2d(len(child.weight), child.eps, track_running_stats=False)
                setattr(module, name, norm)
            elif isinstance(child, Convolution2d):
                sizes = (child.weight.shape[-1], int(child.stride[0]), int(child.padding[0]))
                convolution = nn.Conv2d(child.in_channels, child.out_channels, *sizes)
                convolution.load_state_dict(child.state_dict())
                setattr(module, name, convolution)
    return network


def learn2learn_loop(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
    """Follow learn2learn's own example: clone, adapt and backward for one task after another."""
    maml = learn2learn_maml()(network, lr=inner.lr, first_order=inner.first_order)
    for task in batch.tasks():
        learner = maml.clone()
        for _ in range(inner.steps):
            learner.adapt(loss(learner(task.support_x), task.support_y))
        query_loss = loss(learner(task.query_x), task.query_y) / len(batch.support_x)
        query_loss.backward()  # type: ignore[no-untyped-call]


def higher_loop(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
    """Use higher's `innerloop_ctx`; first order takes the gradient at the adapted parameters."""
    import higher

    optimizer = torch.optim.SGD(network.parameters(), lr=inner.lr)
    for task in batch.tasks():
        with higher.innerloop_ctx(
            network, optimizer, copy_initial_weights=False, track_higher_grads=not inner.first_order
        ) as (learner, inner_optimizer):
            for _ in range(inner.steps):
                inner_optimizer.step(loss(learner(task.support_x), task.support_y))
            query_loss = loss(learner(task.query_x), task.query_y) / len(batch.support_x)
            if not inner.first_order:
                query_loss.backward()  # type: ignore[no-untyped-call]
                continue
            gradients = torch.autograd.grad(query_loss, list(learner.parameters()))
            for p, gradient in zip(network.parameters(), gradients, strict=True):
                p.grad = gradient if p.grad is None else p.grad + gradient


def torchopt_loop(network: nn.Module, loss: Loss, batch: TaskBatch, inner: InnerLoop) -> None:
    """Use TorchOpt's `MetaSGD`, which supports second order only."""
    import torchopt

    optimizer = torchopt.MetaSGD(network, lr=inner.lr)
    initial = torchopt.extract_state_dict(network, by="reference")
    initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
    for task in batch.tasks():
        for _ in range(inner.steps):
            optimizer.step(loss(network(task.support_x), task.support_y))
        query_loss = loss(network(task.query_x), task.query_y) / len(batch.support_x)
        query_loss.backward()  # type: ignore[no-untyped-call]
        torchopt.recover_state_dict(network, initial)
        torchopt.recover_state_dict(optimizer, initial_optimizer)


def lightning_maml(
    network: nn.Module, loss: Loss, inner: InnerLoop
) -> "tuple[torch.nn.Module, Callable[[list[TaskBatch]], DataLoader[tuple[Tensor, Tensor]]]]":
    """Build learn2learn's LightningMAML, which supports second order only.

    Returns:
        The module, and a function that builds its data loader. The loader yields one task per batch,
        so a meta-step of T tasks accumulates the gradients of T batches.
    """
    learn2learn_maml()  # suppresses the banner of gym
    from learn2learn.algorithms import LightningMAML

    module = LightningMAML(
        network, loss, adaptation_steps=inner.steps, adaptation_lr=inner.lr, lr=1e-3,
        **dict.fromkeys(("train_ways", "test_ways"), 1),
    )  # fmt: skip

    def loader(batches: list[TaskBatch]) -> DataLoader[tuple[Tensor, Tensor]]:
        shots, queries = batches[0].support_x.shape[1], batches[0].query_x.shape[1]
        module.train_shots, module.train_queries = shots, queries
        # LightningMAML splits a batch by shots: "one way" with all support, then all query points.
        tasks = [
            (torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y]))
            for batch in batches
            for task in batch.tasks()
        ]
        return DataLoader(tasks, batch_size=None)  # type: ignore[arg-type]

    return module, loader


def ignore_warnings() -> None:
    """Silence PyTorch's warnings about the other libraries' code."""
    warnings.filterwarnings("ignore", module="higher|torchopt|learn2learn")
