"""How well a network does on unseen tasks after each inner step."""

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss
from maml_pipeline.meta_gradient.learn2learn_engine import clone_for_task
from maml_pipeline.tasks import Task, TaskBatch


def adaptation_curves(
    network: nn.Module, measures: dict[str, Loss], loss: Loss, batch: TaskBatch, inner: InnerLoop
) -> dict[str, Tensor]:
    """Adapt to each task and measure the query set before the first and after every inner step.

    Works under `torch.no_grad` and `torch.inference_mode` alike. First-order graphs suffice, and
    each is freed as soon as its step is taken, whatever `inner.first_order` says.

    Args:
        network: Any module; it is left as it is.
        measures: (prediction, target) -> scalar, by name.
        loss: What adaptation descends on the support set.
        batch: T tasks.
        inner: Inner learning rate and steps k.

    Returns:
        By name of the measure, `(T, k + 1)`.
    """
    steps = InnerLoop(inner.lr, inner.steps, first_order=True)
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made under inference mode cannot be saved for a backward pass; their clones can.
        batch = TaskBatch(*(tensor.clone() for tensor in batch))
        by_task = [_task_curves(network, measures, loss, task, steps) for task in batch.tasks()]
    return {name: torch.stack([curves[name] for curves in by_task]) for name in measures}


def _task_curves(
    network: nn.Module, measures: dict[str, Loss], loss: Loss, task: Task, inner: InnerLoop
) -> dict[str, Tensor]:
    learner = clone_for_task(network, inner)
    curves: dict[str, list[Tensor]] = {name: [] for name in measures}
    for step in range(inner.steps + 1):
        with torch.no_grad():
            prediction = learner(task.query_x)
            for name, measure in measures.items():
                curves[name].append(measure(prediction, task.query_y))
        if step < inner.steps:
            learner.adapt(loss(learner(task.support_x), task.support_y))
    return {name: torch.stack(values) for name, values in curves.items()}
