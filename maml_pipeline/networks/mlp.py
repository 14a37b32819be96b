"""The fully connected network of the sine-wave regression."""

from collections.abc import Sequence

from torch import nn


class MLP(nn.Sequential):
    """Map `(S, in_features)` to `(S, out_features)` through ReLU layers.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        hidden_features: Width of each hidden layer; the default is the paper's network.

    References:
        Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
        2017, section 5.1.
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 1,
        hidden_features: Sequence[int] = (40, 40),
    ) -> None:
        layers: list[nn.Module] = []
        width = in_features
        for hidden_width in hidden_features:
            layers += [nn.Linear(width, hidden_width), nn.ReLU()]
            width = hidden_width
        super().__init__(*layers, nn.Linear(width, out_features))
