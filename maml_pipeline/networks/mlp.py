"""The fully connected network for sine-wave regression (Finn et al. 2017)."""

from collections.abc import Sequence

from torch import nn


class MLP(nn.Sequential):
    """Multilayer perceptron with ReLU activations.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        hidden_features: Size of each hidden layer; the default is the network of the paper.

    Shapes: `(S, in_features)` -> `(S, out_features)`.

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
