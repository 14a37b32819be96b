"""The two losses, their gradients by the prediction, and the tangents of these gradients."""

from typing import Any

import numpy as np

from maml_pipeline.meta_gradient.native.layout import DELTA, OUTPUTS
from maml_pipeline.meta_gradient.native.numba_internals import compiled, matrix


@compiled
def loss_and_gradient(classifies: bool, prediction: Any, labels: Any, targets: Any, delta: Any) -> float:
    """Compute the mean loss, and its gradient by the prediction `(S, outputs)`.

    Args:
        classifies: Take the cross-entropy with `labels` `(S,)`, otherwise the mean squared difference
            from `targets` `(S, outputs)`.
        prediction: Logits, or predicted values.
        labels: Classes, in range.
        targets: Values.
        delta: Receives the gradient.
    """
    examples, outputs = prediction.shape
    total = 0.0
    if not classifies:
        for i in range(examples):
            for j in range(outputs):
                difference = prediction[i, j] - targets[i, j]
                total += difference * difference
                delta[i, j] = 2 * difference / (examples * outputs)
        return total / (examples * outputs)  # type: ignore[no-any-return]
    for i in range(examples):
        largest = prediction[i].max()
        normaliser = 0.0
        for j in range(outputs):
            delta[i, j] = np.exp(prediction[i, j] - largest)
            normaliser += delta[i, j]
        total += np.log(normaliser) + largest - prediction[i, labels[i]]
        for j in range(outputs):
            delta[i, j] /= normaliser * examples
        delta[i, labels[i]] -= 1 / examples
    return total / examples  # type: ignore[no-any-return]


@compiled
def gradient_tangent(
    classifies: bool, delta: Any, labels: Any, prediction_dot: Any, delta_dot: Any
) -> None:
    """Compute the tangent of the gradient by the prediction from the tangent of the prediction."""
    examples, outputs = delta.shape
    if not classifies:
        for i in range(examples):
            for j in range(outputs):
                delta_dot[i, j] = 2 * prediction_dot[i, j] / (examples * outputs)
        return
    for i in range(examples):
        mean = 0.0
        for j in range(outputs):  # the probabilities, over the number of examples
            probability = delta[i, j] + (1 / examples if j == labels[i] else 0)
            delta_dot[i, j] = probability
            mean += probability * examples * prediction_dot[i, j]
        for j in range(outputs):
            delta_dot[i, j] *= prediction_dot[i, j] - mean


@compiled
def loss_and_delta(layout: Any, record: Any, prediction: Any, labels: Any, values: Any) -> float:
    """Compute the loss, and its gradient by the prediction in the record."""
    last = layout.dense[-1]
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    return loss_and_gradient(layout.classifies, prediction, labels, values, delta)  # type: ignore[no-any-return]


@compiled
def delta_tangent(layout: Any, record: Any, labels: Any, work: Any) -> None:
    """Compute the tangent of the gradient by the prediction."""
    last = layout.dense[-1]
    delta = matrix(record, last[DELTA], layout.examples, last[OUTPUTS])
    prediction_dot = matrix(work.prediction_dot, 0, layout.examples, last[OUTPUTS])
    delta_dot = matrix(work.delta_dot, 0, layout.examples, last[OUTPUTS])
    gradient_tangent(layout.classifies, delta, labels, prediction_dot, delta_dot)
