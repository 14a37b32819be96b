"""How an adapted network predicts a query set: as one batch, or each point by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from maml_pipeline.tasks import Task, TaskBatch

Predict = Callable[[Tensor, Tensor], Tensor]
"""(inputs, targets) -> predictions of one set, or of one set for each of T tasks."""


def predict_query(predict: Predict, tasks: Task | TaskBatch, transductive: bool) -> Tensor:
    """Predict the query set of one task, or those of T tasks.

    Batch normalisation by batch statistics lets the points of a set see each other. Transductively,
    the query set is one batch, normalised by itself. Otherwise each query point is predicted by
    itself, normalised together with the support set: the last prediction of the support set and that
    one point. No more than S + 1 points of a task are predicted at once, so that memory does not
    depend on the size of the query set; it takes Q forward passes instead of one.

    Args:
        predict: Predicts with the adapted parameters.
        tasks: One task, or a batch of T.
        transductive: Which of the two.

    Returns:
        `(Q, ...)`, or `(T, Q, ...)`.

    References:
        Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, section 6.1.
    """
    if transductive:
        return predict(tasks.query_x, tasks.query_y)
    points = 1 if isinstance(tasks, TaskBatch) else 0  # the dimension that counts them
    predictions = []
    for q in range(tasks.query_x.shape[points]):
        x, y = (
            torch.cat([support, query.narrow(points, q, 1)], points)
            for support, query in (
                (tasks.support_x, tasks.query_x),
                (tasks.support_y, tasks.query_y),
            )
        )
        support_and_point = predict(x, y)
        # A copy, so that the predictions of the support set are freed.
        predictions.append(support_and_point.select(points, -1).clone())
    return torch.stack(predictions, points)
