"""Networks and losses as users write them: each engine is exact for them, or rejects them."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

from maml_pipeline.meta_gradient import Loss
from maml_pipeline.networks import ConvNet
from maml_pipeline.tasks import TaskBatch
from tests.networks import smooth


class Entry(NamedTuple):
    """One network with one loss.

    `inputs` is `vectors (S, 2)`, `tokens (S, 3)` from 0 to 4 or `images (S, 1, 16, 16)`; `rejected`
    maps a computation of `tests/test_exactness.py`, or a prefix of its name, to the expected error.
    """

    build: Callable[[], nn.Module]
    rejected: Mapping[str, str] = MappingProxyType({})
    loss: Loss = mse_loss
    inputs: str = "vectors"
    stops_gradients: bool = False
    random: bool = False


def between(*layers: nn.Module) -> nn.Module:
    """Put layers of four features between two linear ones."""
    return nn.Sequential(nn.Linear(2, 4), *layers, nn.Linear(4, 1))


class Calling(nn.Module):
    """Four linear layers, extended by `prepare` and evaluated by `call`."""

    def __init__(
        self, call: Callable[[Any, Tensor], Tensor], prepare: Callable[[Any], None] | None = None
    ) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.call = call
        if prepare is not None:
            prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def plain(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
    return y


def with_list(self: Any) -> None:
    self.layers = [self.a, nn.Tanh(), self.b, nn.Tanh(), self.c]


def through_list(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    return x


def with_list_in_dict(self: Any) -> None:
    self.layers = {"in": self.a, "middle": self.b, "out": self.c}


def through_dict(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.layers["out"](torch.tanh(self.layers["middle"](torch.tanh(self.layers["in"](x)))))
    return y


def with_bound_method(self: Any) -> None:
    self.first = self.a.forward


def through_bound_method(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.first(x)))))
    return y


def with_lambda(self: Any) -> None:
    layer = self.b
    self.middle = lambda x: torch.tanh(layer(x))


def through_lambda(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(self.middle(torch.tanh(self.a(x))))
    return y


def with_parameters_in_dict(self: Any) -> None:
    self.weights = {"b": self.b.weight}


def through_parameters_in_dict(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(torch.tanh(functional.linear(torch.tanh(self.a(x)), self.weights["b"])))
    return y


def with_closure_over_parameter(self: Any) -> None:
    weight = self.b.weight
    self.middle = lambda x: torch.tanh(x @ weight)


def with_view(self: Any) -> None:
    self.view = self.b.weight.detach().view(16)


def through_view(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))) * self.view.sum())
    return y


def with_child_that_knows_its_parent(self: Any) -> None:
    class Child(nn.Module):
        def __init__(self, parent: Any) -> None:
            super().__init__()
            self.parent = [parent]  # not registered: it would be a cycle

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.parent[0].b(x))

    self.child = Child(self)


def through_child(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(self.child(torch.tanh(self.a(x))))
    return y


def recomputed(self: Any, x: Tensor, use_reentrant: bool = False) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    y: Tensor = self.c(checkpoint(block, x, use_reentrant=use_reentrant))
    return y


def recomputed_middle(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.c(checkpoint(self.b, self.a(x), use_reentrant=True))
    return y


def changing_its_input(self: Any, x: Tensor) -> Tensor:
    return plain(self, x.mul_(0.5).add_(0.1))


def storing_an_activation(self: Any, x: Tensor) -> Tensor:
    self.activation = torch.tanh(self.a(x))
    y: Tensor = self.c(torch.tanh(self.b(self.activation)))
    return y


def appending_an_activation(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x))
    self.activations.append(h)
    y: Tensor = self.c(torch.tanh(self.b(h)))
    return y


def building_a_mask_once(self: Any, x: Tensor) -> Tensor:
    if self.mask is None:
        self.mask = (x.new_ones(4) * torch.arange(4).to(x)).cos()
    y: Tensor = self.c(torch.tanh(self.a(x)) * self.mask)
    return y


def counting_calls(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return plain(self, x)


def annealing(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return plain(self, x) / self.calls  # type: ignore[no-any-return]


def averaging(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x))
    if self.training:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean()
        return self.c(h - h.mean())  # type: ignore[no-any-return]
    return self.c(h - self.mean)  # type: ignore[no-any-return]


def with_attribute(name: str, value: Any, self: Any) -> None:
    setattr(self, name, value)


def with_hook(self: Any) -> None:
    activations: list[Tensor] = []
    self.a.register_forward_hook(lambda module, inputs, output: activations.append(output))


def with_changing_hook(self: Any) -> None:
    gain = nn.Parameter(torch.tensor(1.5))
    self.gain = gain
    self.a.register_forward_hook(lambda module, inputs, output: output * gain)


def straight_through(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x))
    return self.c(h + (h.round() - h).detach())  # type: ignore[no-any-return]


def stopping(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    with torch.no_grad():
        length = h.square().mean().sqrt()
    return self.c(torch.tanh(h / length))  # type: ignore[no-any-return]


def in_single_precision(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    h = (h.float() * torch.rsqrt(h.float().square().mean(-1, keepdim=True) + 1e-5)).to(h)
    return self.c(torch.tanh(h))  # type: ignore[no-any-return]


class Squared(torch.autograd.Function):
    """x^2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient  # type: ignore[no-any-return]


class Detached(Squared):
    """x^2 without a second derivative, which may be intended."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * gradient  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """An embedding with the given settings, the mean over tokens, and a linear layer."""

    def __init__(self, functional: bool = False, **settings: Any) -> None:
        super().__init__()
        self.functional, self.settings = functional, settings
        self.embedding = nn.Embedding(5, 4, **({} if functional else settings))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = (
            functional.embedding(x, self.embedding.weight, **self.settings)
            if self.functional
            else self.embedding(x)
        )
        return self.head(torch.tanh(h).mean(1))  # type: ignore[no-any-return]


class Bag(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, 4, **settings), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layer, self.head = layer(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


class Attending(nn.Module):
    """Each of S vectors attends to all."""

    def __init__(self, causal: bool = False, layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.first, self.head, self.causal = nn.Linear(2, 4), nn.Linear(4, 1), causal
        self.layer = nn.Linear(4, 12) if layer is None else layer()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)[None]
        if isinstance(self.layer, nn.MultiheadAttention):
            h = self.layer(h, h, h, need_weights=False)[0]
        elif isinstance(self.layer, nn.Linear):
            q, k, v = self.layer(h).view(1, -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
            h = (
                functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
                .transpose(1, 2)
                .flatten(2)
            )
        else:
            h = self.layer(h)
        return self.head(h[0])  # type: ignore[no-any-return]


class Sampling(nn.Module):
    """Samples an image at learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.head = nn.Linear(2, 2), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = torch.arange(16.0).view(1, 1, 4, 4).to(x)
        grid = torch.tanh(self.where(x))[None, :, None]
        return self.head(functional.grid_sample(image, grid, align_corners=True)[0, 0])  # type: ignore[no-any-return]


class Distances(nn.Module):
    """Distances to learned centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.head = nn.Parameter(torch.randn(4, 2)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x, self.centres, p=1.5))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.d = nn.Linear(4, 4)
        self.d.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.d(torch.tanh(self.b(self.a(x))))))  # type: ignore[no-any-return]


def changing_its_target(prediction: Tensor, target: Tensor) -> Tensor:
    return mse_loss(prediction, target.sub_(target.mean()))


def detaching(prediction: Tensor, target: Tensor) -> Tensor:
    return mse_loss(prediction, target + 0.5 * prediction.detach())


STATE = "changes its buffer"
ATTRIBUTE = "read parameters from the attributes that hold them"
RECOMPUTED = "recomputes its activations"
WEIGHT_NORM = {
    f"train {engine} second": "wrong second derivative" for engine in ("vectorized", "learn2learn")
}
WRONG_TWICE = "the second derivative of network .* is wrong in PyTorch"
ASYMMETRIC = {
    f"train {engine} hessian free": "the gradient of network .* is not that of its loss values"
    for engine in ("vectorized", "learn2learn")
}
SECOND_DERIVATIVE = {f"train {engine} second": WRONG_TWICE for engine in ("vectorized", "learn2learn")}
NO_SECOND_DERIVATIVE = {
    f"train {engine} second": r"derivative for '?\S*_backward'? is not implemented; replace that "
    "layer, or set method to hessian_free or first_order to true$"
    for engine in ("vectorized", "learn2learn")
}
MAPPED = r"engine vectorized cannot run network .* under vmap: .*; use engine learn2learn"

ZOO: dict[str, Entry] = {
    "linear": Entry(lambda: nn.Linear(2, 1)),
    "tanh": Entry(lambda: between(nn.Tanh())),
    "relu": Entry(lambda: between(nn.ReLU(), nn.Linear(4, 4), nn.LeakyReLU())),
    "gelu": Entry(lambda: between(nn.GELU(), nn.LayerNorm(4))),
    "prelu, in place": Entry(lambda: between(nn.PReLU(), nn.ReLU(inplace=True))),
    "softmax": Entry(lambda: between(nn.Softmax(-1), nn.SiLU())),
    "bilinear": Entry(
        lambda: Calling(
            lambda s, x: s.c(s.d(s.a(x), s.a(x))), partial(with_attribute, "d", nn.Bilinear(4, 4, 4))
        )
    ),
    "batch normalisation": Entry(
        lambda: between(nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh())
    ),
    "running statistics": Entry(
        lambda: between(nn.BatchNorm1d(4)), {"train": f"{STATE}.*track_running_stats=False"}
    ),
    "momentum zero": Entry(lambda: between(nn.BatchNorm1d(4, momentum=0.0)), {"train": STATE}),
    "instance normalisation with statistics": Entry(
        lambda: Calling(
            lambda s, x: s.c(s.d(s.a(x)[None].mT)[0].mT),
            partial(with_attribute, "d", nn.InstanceNorm1d(4, track_running_stats=True)),
        ),
        {"train": STATE},
    ),
    "spectral normalisation": Entry(
        lambda: between(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        {"train": f"{STATE}.*matrix_norm"},
    ),
    "spectral normalisation, old": Entry(
        lambda: between(nn.utils.spectral_norm(nn.Linear(4, 4))), {"train": f"{STATE}.*matrix_norm"}
    ),
    "weight normalisation": Entry(
        lambda: between(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()), WEIGHT_NORM
    ),
    "weight normalisation, old": Entry(
        lambda: between(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh()), WEIGHT_NORM
    ),
    "wrong Function": Entry(
        lambda: Calling(lambda s, x: s.c(Detached.apply(s.a(x)))), stops_gradients=True
    ),
    "orthogonal": Entry(
        lambda: between(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh())
    ),
    "dropout": Entry(
        lambda: between(nn.Dropout(0.5), nn.Tanh()),
        {
            "train vectorized": "draws random numbers",
            "train learn2learn second checkpointed": "set method to unrolled",
            "train learn2learn hessian free": "set method to unrolled",
        },
        random=True,
    ),
    "tied": Entry(Tied),
    "frozen": Entry(lambda: between(nn.Linear(4, 4).requires_grad_(False), nn.Tanh())),
    "frozen statistics": Entry(lambda: between(nn.BatchNorm1d(4).eval(), nn.Tanh())),
    "list": Entry(lambda: Calling(through_list, with_list)),
    "dict of layers": Entry(lambda: Calling(through_dict, with_list_in_dict)),
    "bound method": Entry(lambda: Calling(through_bound_method, with_bound_method)),
    "lambda": Entry(lambda: Calling(through_lambda, with_lambda)),
    "child that knows its parent": Entry(
        lambda: Calling(through_child, with_child_that_knows_its_parent)
    ),
    "dict of parameters": Entry(
        lambda: Calling(through_parameters_in_dict, with_parameters_in_dict), {"": ".*"}
    ),
    "closure over a parameter": Entry(
        lambda: Calling(through_lambda, with_closure_over_parameter), {"": ".*"}
    ),
    "view": Entry(lambda: Calling(through_view, with_view), {"": "through a view or .data"}),
    "recomputed": Entry(
        lambda: Calling(recomputed),
        {
            "train vectorized": ".*",
            "eval vectorized": ".*",
            "train learn2learn second": RECOMPUTED,
            "train learn2learn hessian free": RECOMPUTED,
        },
    ),
    "recomputed, reentrant": Entry(
        lambda: Calling(partial(recomputed, use_reentrant=True)), {"": "use_reentrant=False"}
    ),
    "recomputed in the middle, reentrant": Entry(
        lambda: Calling(recomputed_middle), {"": "use_reentrant=False"}
    ),
    "input changed in place": Entry(lambda: Calling(changing_its_input)),
    "target changed in place": Entry(lambda: Calling(plain), loss=changing_its_target),
    "activation stored": Entry(lambda: Calling(storing_an_activation)),
    "activation appended": Entry(
        lambda: Calling(appending_an_activation, lambda s: with_attribute("activations", [], s))
    ),
    "mask built once": Entry(
        lambda: Calling(building_a_mask_once, partial(with_attribute, "mask", None))
    ),
    "calls counted": Entry(lambda: Calling(counting_calls, partial(with_attribute, "calls", 0))),
    "annealed": Entry(
        lambda: Calling(annealing, partial(with_attribute, "calls", 1)),
        {
            "train": "reads in evaluation what training assigned to its attribute calls",
            "eval": "or its loss keeps state",
        },
    ),
    "statistics in an attribute": Entry(
        lambda: Calling(averaging, partial(with_attribute, "mean", torch.zeros(()))),
        {"train": "reads in evaluation"},
    ),
    "hook": Entry(lambda: Calling(plain, with_hook)),
    "hook over a parameter": Entry(lambda: Calling(plain, with_changing_hook), {"": ".*"}),
    "straight-through": Entry(lambda: Calling(straight_through), ASYMMETRIC, stops_gradients=True),
    "no_grad": Entry(lambda: Calling(stopping), ASYMMETRIC, stops_gradients=True),
    "single precision inside": Entry(
        lambda: Calling(in_single_precision), ASYMMETRIC, stops_gradients=True
    ),
    "right Function": Entry(lambda: Calling(lambda s, x: s.c(Squared.apply(s.a(x))))),
    "embedding": Entry(Tokens, inputs="tokens"),
    "padding": Entry(lambda: Tokens(padding_idx=0), inputs="tokens"),
    "negative padding": Entry(lambda: Tokens(padding_idx=-2), inputs="tokens"),
    "functional padding": Entry(lambda: Tokens(functional=True, padding_idx=1), inputs="tokens"),
    "max_norm": Entry(
        lambda: Tokens(max_norm=0.5), {"": "changes its parameter embedding.weight"}, inputs="tokens"
    ),
    "scaled by frequency": Entry(
        lambda: Tokens(scale_grad_by_freq=True), SECOND_DERIVATIVE | ASYMMETRIC, inputs="tokens"
    ),
    "sparse": Entry(
        lambda: Tokens(sparse=True),
        {
            "train vectorized": MAPPED,
            "eval vectorized": MAPPED,
            "train learn2learn second checkpointed": "set method to unrolled",
            "train learn2learn hessian free": "set method to unrolled",
        },
        inputs="tokens",
    ),
    "bag": Entry(Bag, NO_SECOND_DERIVATIVE, inputs="tokens"),
    "bag with padding": Entry(lambda: Bag(padding_idx=0), NO_SECOND_DERIVATIVE, inputs="tokens"),
    "LSTM": Entry(lambda: Recurrent(nn.LSTM), {"train vectorized": MAPPED, "eval vectorized": MAPPED}),
    "GRU": Entry(lambda: Recurrent(nn.GRU), {"train vectorized": MAPPED, "eval vectorized": MAPPED}),
    "attention": Entry(Attending),
    "causal attention": Entry(lambda: Attending(causal=True)),
    "MultiheadAttention": Entry(
        lambda: Attending(layer=lambda: nn.MultiheadAttention(4, 2, batch_first=True))
    ),
    "TransformerEncoderLayer": Entry(
        lambda: Attending(
            layer=lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        )
    ),
    "TransformerEncoder, norm first": Entry(
        lambda: Attending(
            layer=lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=True),
                2,
                enable_nested_tensor=False,
            )
        )
    ),
    "grid sampling": Entry(Sampling),
    "distances": Entry(Distances),
    "Huber": Entry(lambda: between(nn.Tanh()), loss=nn.HuberLoss()),
    "detaching loss": Entry(lambda: between(nn.Tanh()), loss=detaching, stops_gradients=True),
    "ConvNet": Entry(lambda: ConvNet(ways=3, filters=4), loss=cross_entropy, inputs="images"),
    "ConvNet, max pooling": Entry(
        lambda: ConvNet(ways=3, filters=4, downsampling="max_pool"), loss=cross_entropy, inputs="images"
    ),
    "label smoothing": Entry(
        lambda: smooth(ConvNet(ways=3, filters=4)),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        inputs="images",
    ),
    "class weights": Entry(
        lambda: smooth(ConvNet(ways=3, filters=4)),
        loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        inputs="images",
    ),
}


def build(entry: Entry) -> tuple[nn.Module, TaskBatch]:
    """Build a float64 network and three random tasks that fit it."""
    torch.manual_seed(0)
    network = entry.build().double()
    if isinstance(network, Calling) and hasattr(network, "view"):
        with_view(network)  # of the parameters in their new type
    generator = torch.Generator().manual_seed(1)

    def x() -> Tensor:
        if entry.inputs == "tokens":
            return torch.randint(5, (3, 6, 3), generator=generator)
        if entry.inputs == "images":
            return torch.rand(3, 6, 1, 16, 16, generator=generator, dtype=torch.float64)
        return torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)

    def y() -> Tensor:
        if entry.inputs == "images":
            return torch.arange(3).repeat(3, 2)
        return torch.randn(3, 6, 1, generator=generator, dtype=torch.float64)

    if isinstance(entry.loss, nn.Module):
        entry.loss.double()
    return network, TaskBatch(x(), y(), x(), y())
