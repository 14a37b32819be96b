"""Support and query sets as arrays."""

from typing import Any, NamedTuple


class Examples(NamedTuple):
    """Support or query sets of T tasks, as arrays.

    Args:
        inputs: `(T, S, features)`, or images as `(T, S * height * width, channels)`.
        labels: `(T, S)` if the loss is the cross-entropy, otherwise `(T, 0)`.
        values: `(T, S, outputs)` if the loss is the mean squared error, otherwise `(T, 0, 0)`.
    """

    inputs: Any
    labels: Any
    values: Any

    def tasks(self, chunk: slice) -> "Examples":
        """Select tasks."""
        return Examples(self.inputs[chunk], self.labels[chunk], self.values[chunk])
