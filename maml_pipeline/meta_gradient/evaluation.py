"""Adaptation curves: the query set measured before the first inner step and after each one."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from maml_pipeline.meta_gradient.adaptation import inner_step
from maml_pipeline.meta_gradient.chunk_loss import ChunkLoss, PredictEach
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss, Parameters
from maml_pipeline.tasks import TaskBatch

State = TypeVar("State")
Predict = Callable[[Tensor, Tensor], Tensor]
"""(inputs `(T, S, ...)`, targets) -> predictions `(T, S, ...)`."""


def chunk_curves(
    chunk_loss: ChunkLoss,
    predict_each: PredictEach,
    measures: dict[str, Loss],
    theta: Parameters,
    chunk: TaskBatch,
    inner: InnerLoop,
    transductive: bool,
) -> dict[str, Tensor]:
    """Compute the adaptation curves of a chunk of T tasks: `(T, k + 1)` for each measure.

    Args:
        chunk_loss: Loss of each task of the chunk.
        predict_each: Predicts one task after another, by plain calls of the network.
        measures: (prediction, target) -> scalar, by name.
        theta: Initial parameters, which all tasks share.
        chunk: T tasks.
        inner: Inner learning rate and number of steps k.
        transductive: See `predict_query`.
    """
    return adaptation_curves(
        inner_steps(chunk_loss, theta, chunk, inner),
        lambda adapted, x, y: chunk_loss(adapted, x, y)[1],
        lambda adapted, x, y: predict_each(adapted, x),
        *(measures, chunk, inner.steps, transductive),
    )


def inner_steps(
    chunk_loss: ChunkLoss, theta: Parameters, chunk: TaskBatch, inner: InnerLoop
) -> Iterator[Parameters]:
    """Yield the parameters `(T, ...)` before the first inner step and after each one."""
    adapted = chunk_loss.start(theta, chunk.support_x)
    yield adapted
    for t in range(inner.steps):
        adapted = inner_step(chunk_loss, adapted, chunk.support_x, chunk.support_y, inner, t)[0]
        yield adapted


def adaptation_curves(
    states: Iterable[State],
    predict: Callable[[State, Tensor, Tensor], Tensor],
    predict_adapted: Callable[[State, Tensor, Tensor], Tensor],
    measures: dict[str, Loss],
    chunk: TaskBatch,
    steps: int,
    transductive: bool,
) -> dict[str, Tensor]:
    """Compute adaptation curves, however the adapted parameters are represented.

    Args:
        states: The k + 1 sets of parameters, or modules that hold them.
        predict: (state, inputs, targets) -> predictions.
        predict_adapted: The same after the last inner step, to the bit as a plain network predicts.
        measures: (prediction, target) -> scalar, by name.
        chunk: T tasks.
        steps: Number of inner steps k.
        transductive: See `predict_query`.

    Returns:
        `(T, k + 1)` for each measure, by its name.
    """
    curves: dict[str, list[Tensor]] = {name: [] for name in measures}
    for t, state in enumerate(states):
        call = partial(predict_adapted if t == steps else predict, state)
        with torch.no_grad():
            prediction = predict_query(call, chunk, transductive)
            for name, measure in measures.items():
                curves[name].append(measure_each_task(measure, prediction, chunk.query_y))
    return {name: torch.stack(values, dim=1) for name, values in curves.items()}


def measure_each_task(measure: Loss, prediction: Tensor, target: Tensor) -> Tensor:
    """Apply a measure to one task at a time, since it need not support vmap: -> `(T,)`."""
    pairs = zip(prediction, target, strict=True)
    return torch.stack([measure(task_prediction, y) for task_prediction, y in pairs])


def predict_query(predict: Predict, chunk: TaskBatch, transductive: bool) -> Tensor:
    """Predict query sets as one batch each (transductive), or one query point at a time.

    Batch normalisation with batch statistics makes a prediction depend on the other points of its
    batch. Transductive evaluation predicts each query set as one batch. Otherwise each query point is
    predicted in a batch with the support set. That takes Q forward passes over S + 1 points per task,
    so that memory does not depend on Q.

    Args:
        predict: Predicts with the adapted parameters.
        chunk: T tasks.
        transductive: Whether query points share a batch.

    Returns:
        Predictions `(T, Q, ...)`.

    References:
        Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, section 6.1.
    """
    if transductive:
        return predict(chunk.query_x, chunk.query_y)
    predictions = []
    for q in range(chunk.query_x.shape[1]):
        x = torch.cat([chunk.support_x, chunk.query_x[:, q : q + 1]], dim=1)
        y = torch.cat([chunk.support_y, chunk.query_y[:, q : q + 1]], dim=1)
        # Cloned, so that the predictions of the support set can be freed.
        predictions.append(predict(x, y)[:, -1].clone())
    return torch.stack(predictions, dim=1)
