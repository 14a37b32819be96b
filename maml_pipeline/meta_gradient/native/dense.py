"""Fully connected layers with ReLUs in between, and their derivatives of both orders."""

from typing import Any

from maml_pipeline.meta_gradient.native.layout import (
    DELTA,
    DENSE_BIAS,
    DENSE_WEIGHT,
    INPUTS,
    OUTPUTS,
    X_DOT,
    X,
)
from maml_pipeline.meta_gradient.native.numba_internals import compiled, flat, matrix
from maml_pipeline.meta_gradient.native.products import (
    add,
    add_rows,
    add_scaled,
    add_to_rows,
    add_to_rows_and_rectify,
    copy,
    mask,
    product,
    product_by_input,
    product_by_weights,
)


@compiled
def dense_weights(layer: Any, parameters: Any) -> Any:
    """View the weights of a layer: `(outputs, inputs)`."""
    return matrix(parameters, layer[DENSE_WEIGHT], layer[OUTPUTS], layer[INPUTS])


@compiled
def dense_bias(layer: Any, parameters: Any) -> Any:
    """View the bias of a layer."""
    return parameters[layer[DENSE_BIAS] : layer[DENSE_BIAS] + layer[OUTPUTS]]


@compiled
def input_of(layout: Any, record: Any) -> Any:
    """View the input of the first layer in a record."""
    layer = layout.dense[0]
    return matrix(record, layer[X], layout.examples, layer[INPUTS])


@compiled
def dense_values(layout: Any, theta: Any, record: Any, prediction: Any) -> None:
    """Compute the prediction and the input of each layer; the first one's is in the record."""
    last = len(layout.dense) - 1
    for level in range(last + 1):
        layer = layout.dense[level]
        x = matrix(record, layer[X], layout.examples, layer[INPUTS])
        if level < last:
            out = matrix(record, layout.dense[level + 1][X], layout.examples, layer[OUTPUTS])
        else:
            out = prediction
        product(x, dense_weights(layer, theta), out)
        if level < last:
            add_to_rows_and_rectify(dense_bias(layer, theta), out)
        else:
            add_to_rows(dense_bias(layer, theta), out)


@compiled
def add_dense_gradient(
    layout: Any, theta: Any, record: Any, work: Any, factor: float, target: Any
) -> None:
    """Add `factor` times the gradient by the layers' parameters to `target`.

    The record holds the gradient by the prediction. `work.features` receives the gradient by the input
    of the first layer, if it has room. `target` may be theta, or have no elements.
    """
    for level in range(len(layout.dense) - 1, -1, -1):
        layer = layout.dense[level]
        x = matrix(record, layer[X], layout.examples, layer[INPUTS])
        delta = matrix(record, layer[DELTA], layout.examples, layer[OUTPUTS])
        weights = dense_weights(layer, theta)
        if level > 0:
            before = matrix(record, layout.dense[level - 1][DELTA], layout.examples, layer[INPUTS])
            product_by_input(delta, weights, before)
            mask(x, before)
        elif len(work.features) > 0:
            features = matrix(work.features, 0, layout.examples, layer[INPUTS])
            product_by_input(delta, weights, features)
        if target.size == 0:
            continue
        total = matrix(work.sums, 0, layer[OUTPUTS], layer[INPUTS])
        product_by_weights(delta, x, total)
        add_scaled(factor, total, dense_weights(layer, target))
        add_rows(factor, delta, dense_bias(layer, target))


@compiled
def dense_tangents(
    layout: Any, theta: Any, direction: Any, record: Any, tangents: Any, work: Any
) -> None:
    """Compute the tangents of what `dense_values` computes.

    The tangent of the first layer's input is in `tangents` if there are blocks; otherwise it is zero.
    """
    last = len(layout.dense) - 1
    for level in range(last + 1):
        layer = layout.dense[level]
        x = matrix(record, layer[X], layout.examples, layer[INPUTS])
        if level < last:
            following = layout.dense[level + 1]
            out = matrix(tangents, following[X_DOT], layout.examples, layer[OUTPUTS])
            values = matrix(record, following[X], layout.examples, layer[OUTPUTS])
        else:
            out = values = matrix(work.prediction_dot, 0, layout.examples, layer[OUTPUTS])
        product(x, dense_weights(layer, direction), out)
        if level > 0 or len(layout.blocks) > 0:
            x_dot = matrix(tangents, layer[X_DOT], layout.examples, layer[INPUTS])
            from_input = matrix(work.part, 0, layout.examples, layer[OUTPUTS])
            product(x_dot, dense_weights(layer, theta), from_input)
            add(from_input, out)
        add_to_rows(dense_bias(layer, direction), out)
        if level < last:
            mask(values, out)


@compiled
def add_dense_curvature(
    layout: Any,
    theta: Any,
    direction: Any,
    record: Any,
    tangents: Any,
    work: Any,
    factor: float,
    target: Any,
) -> None:
    """Add `factor` times the tangent of the gradient by the layers' parameters to `target`.

    `work.delta_dot` holds the tangent of the gradient by the prediction and is overwritten.
    `work.features` receives the tangent of the gradient by the input of the first layer, if it has room.
    `target` may be the direction.
    """
    for level in range(len(layout.dense) - 1, -1, -1):
        layer = layout.dense[level]
        x = matrix(record, layer[X], layout.examples, layer[INPUTS])
        delta = matrix(record, layer[DELTA], layout.examples, layer[OUTPUTS])
        own_dot = matrix(work.delta_dot, 0, layout.examples, layer[OUTPUTS])
        weights, weights_dot = dense_weights(layer, theta), dense_weights(layer, direction)
        total = matrix(work.sums, 0, layer[OUTPUTS], layer[INPUTS])
        product_by_weights(own_dot, x, total)
        if level > 0 or len(layout.blocks) > 0:
            x_dot = matrix(tangents, layer[X_DOT], layout.examples, layer[INPUTS])
            more = matrix(work.sums, weights.size, layer[OUTPUTS], layer[INPUTS])
            product_by_weights(delta, x_dot, more)
            add(more, total)
            gradient_dot = matrix(work.part, 0, layout.examples, layer[INPUTS])
            from_delta = matrix(work.part, gradient_dot.size, layout.examples, layer[INPUTS])
            product_by_input(own_dot, weights, gradient_dot)
            product_by_input(delta, weights_dot, from_delta)
            add(from_delta, gradient_dot)
        add_scaled(factor, total, dense_weights(layer, target))
        add_rows(factor, own_dot, dense_bias(layer, target))
        if level > 0:
            mask(x, gradient_dot)
            copy(flat(gradient_dot), work.delta_dot[: gradient_dot.size])
        elif len(work.features) > 0:
            copy(flat(gradient_dot), work.features[: gradient_dot.size])
