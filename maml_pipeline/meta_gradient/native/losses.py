"""The two losses, their gradients by the prediction, and the tangents of these gradients."""

from typing import Any

import numpy as np

from maml_pipeline.meta_gradient.native.kernels import Kernel
from maml_pipeline.meta_gradient.native.operands import labels, matrices


@Kernel
def cross_entropy(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the mean cross-entropy and its gradient. Operands: prediction, gradient, loss, labels."""
    prediction, delta, loss = matrices(arrays, operands, 3)
    classes = labels(arrays, operands, 3)
    examples, outputs = prediction.shape
    total = 0.0
    for i in range(examples):
        largest = prediction[i, 0]
        for j in range(1, outputs):
            largest = prediction[i, j] if prediction[i, j] > largest else largest
        normaliser = 0.0
        for j in range(outputs):
            delta[i, j] = np.exp(prediction[i, j] - largest)
            normaliser += delta[i, j]
        total += np.log(normaliser) + largest - prediction[i, classes[i]]
        for j in range(outputs):
            delta[i, j] /= normaliser * examples
        delta[i, classes[i]] -= 1 / examples
    loss[0, 0] = total / examples


@Kernel
def squared_error(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the mean squared error and its gradient. Operands: prediction, values, gradient, loss."""
    prediction, values, delta, loss = matrices(arrays, operands, 4)
    total = 0.0
    for i in range(len(prediction)):
        for j in range(prediction.shape[1]):
            difference = prediction[i, j] - values[i, j]
            total += difference * difference
            delta[i, j] = 2 * difference / prediction.size
    loss[0, 0] = total / prediction.size


@Kernel
def cross_entropy_tangent(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the tangents of the gradient of the mean cross-entropy.

    Operands: gradient, tangents of the prediction, the matrix that receives the result, labels.
    """
    delta, prediction_dot, delta_dot = matrices(arrays, operands, 3)
    classes = labels(arrays, operands, 3)
    examples, outputs = delta.shape
    for i in range(examples):
        mean = 0.0
        for j in range(outputs):  # the probabilities, over the number of examples
            probability = delta[i, j] + (1 / examples if j == classes[i] else 0)
            delta_dot[i, j] = probability
            mean += probability * examples * prediction_dot[i, j]
        for j in range(outputs):
            delta_dot[i, j] *= prediction_dot[i, j] - mean


@Kernel
def squared_error_tangent(arrays: Any, operands: Any, factor: float) -> None:
    """Compute the tangents of the gradient of the mean squared error.

    Operands: tangents of the prediction, and the matrix that receives the result.
    """
    prediction_dot, delta_dot = matrices(arrays, operands, 2)
    for i in range(len(delta_dot)):
        for j in range(delta_dot.shape[1]):
            delta_dot[i, j] = 2 * prediction_dot[i, j] / delta_dot.size
