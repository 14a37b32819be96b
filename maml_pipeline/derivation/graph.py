"""The computation graphs of the two gradient orders, side by side, drawn by Graphviz."""

from collections.abc import Sequence
from pathlib import Path

import graphviz
from torch import Tensor

from maml_pipeline.derivation.derive import Derivation, InnerStep, names
from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically

SUFFIXES = (".svg", ".png", ".dot")

# Okabe and Ito's colours, told apart by colour-blind readers too.
KEPT = "#D55E00"  # what only the second order has
CUT = "#8A8A8A"
FILLS = {"initial": "#56B4E9", "fast": "#A6DCC8", "loss": "#F5E6A8", "gradient": "#FFFFFF"}
FONT = "Helvetica,Arial,sans-serif"


def check_path(path: Path) -> None:
    """Raise a `UserError` where no graph could be written to this path."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"graph is {path}; its name must end in {', '.join(SUFFIXES[:-1])} or .dot")
    if not path.parent.is_dir():
        raise UserError(f"graph is {path}; there is no folder {path.parent}, make it first")


def draw(derivations: Sequence[Derivation], path: Path) -> None:
    """Draw derivations of one task side by side and write the picture.

    Args:
        derivations: First order, second order or both, in this sequence.
        path: Where to; the name's end says as what: .svg, .png, or .dot for Graphviz's source.

    Raises:
        UserError: The path cannot be written, or Graphviz's program is missing.
    """
    check_path(path)
    graph = computation_graph(derivations)
    if path.suffix == ".png":
        # For pixels alone: Graphviz scales an SVG's drawing by it but not its viewBox, and crops it.
        graph.graph_attr["dpi"] = "110"
    if path.suffix == ".dot":
        picture = graph.source.encode()
    else:
        try:
            picture = graph.pipe(format=path.suffix[1:])
        except graphviz.ExecutableNotFound as error:
            raise UserError(
                f"graph is {path}; drawing it takes Graphviz's program `dot`, which is not installed: "
                "install it (apt install graphviz, brew install graphviz or conda install graphviz) "
                f"or give {path.with_suffix('.dot')}, which needs no program"
            ) from error
    try:
        write_atomically(path, picture)
    except OSError as error:
        raise UserError(f"graph is {path}; it cannot be written: {error.strerror}") from error


def computation_graph(derivations: Sequence[Derivation]) -> graphviz.Digraph:
    """Build the graphs, one cluster an order.

    Between the first and the last of more than three inner steps, the others become one node.

    Args:
        derivations: First order, second order or both, in this sequence.
    """
    graph = graphviz.Digraph(
        "derivation",
        graph_attr={
            "fontname": FONT,
            "fontsize": "13",
            "bgcolor": "white",
            "nodesep": "0.45",
            "ranksep": "0.5",
            "labelloc": "b",
            "label": _caption(derivations),
        },
        node_attr={
            "fontname": FONT,
            "fontsize": "12",
            "shape": "box",
            "style": "filled,rounded",
            "color": "#404040",
            "margin": "0.15,0.08",
        },
        edge_attr={"fontname": FONT, "fontsize": "11", "color": "#404040"},
    )
    for derivation in derivations:
        first = derivation.inner.first_order
        with graph.subgraph(name="cluster_first" if first else "cluster_second") as cluster:
            _order(cluster, derivation)
    return graph


def _caption(derivations: Sequence[Derivation]) -> str:
    lines = ["An arrow leads from a value to what is computed from it; derivatives flow back along it."]
    if derivations[0].inner.steps > 0:
        lines.append("A dashed one hands over the number alone: no derivative comes back along it.")
    return "\\l".join(["", *lines, ""])


def _order(cluster: graphviz.Digraph, derivation: Derivation) -> None:
    first = derivation.inner.first_order
    order, flag = ("First order", "False") if first else ("Second order", "True")
    cluster.attr(
        label=f'<<font point-size="18"><b>{order}</b></font><br/>create_graph={flag}>',
        labelloc="t",
        style="rounded",
        color="#B0B0B0",
        margin="14",
    )
    prefix = "first" if first else "second"
    inputs = len(derivation.theta) - 1
    cluster.node(
        f"{prefix}_theta0",
        _label("Initial parameters", _assignments(names(inputs, "0"), derivation.theta)),
        fillcolor=FILLS["initial"],
    )

    steps = list(enumerate(derivation.inner_steps))
    k = len(steps)
    abbreviated = k > 3
    for t, step in [steps[0], steps[-1]] if abbreviated else steps:
        _inner_step(cluster, prefix, t, step, k)
    if abbreviated:
        _fast_weights(cluster, prefix, k - 1, derivation.inner_steps[-1].theta)
        between = f"{prefix}_between"
        text = f"inner steps 2 to {k - 1}, alike"
        cluster.node(between, text, shape="plaintext", style="")
        cluster.edge(f"{prefix}_theta1", between, style="dotted", arrowhead="none")
        cluster.edge(between, f"{prefix}_theta{k - 1}", style="dotted")

    loss = f"L_q({', '.join(_shown(names(inputs, str(k))))}) = {derivation.query_loss.item():.4g}"
    cluster.node(f"{prefix}_query", _label("Query loss", [loss]), fillcolor=FILLS["loss"])
    cluster.edge(f"{prefix}_theta{k}", f"{prefix}_query")
    _result(cluster, prefix, derivation)


def _inner_step(cluster: graphviz.Digraph, prefix: str, t: int, step: InnerStep, k: int) -> None:
    inputs = len(step.theta) - 1
    before = names(inputs, str(t))
    theta, loss, gradient, fast = (
        f"{prefix}_{name}" for name in (f"theta{t}", f"loss{t}", f"gradient{t}", f"theta{t + 1}")
    )
    step_of = "" if k == 1 else f", inner step {t + 1}"
    cluster.node(
        loss,
        _label(
            f"Support loss{step_of}",
            [f"L_s({', '.join(_shown(before))}) = {step.support_loss.item():.4g}"],
        ),
        fillcolor=FILLS["loss"],
    )
    slopes = _assignments([f"dL_s/d{name}" for name in before], step.support_gradient)
    kept = step.requires_grad
    cluster.node(
        gradient,
        _label("Support gradient", [*slopes, f"requires_grad={kept}"]),
        fillcolor=FILLS["gradient"],
        color=KEPT if kept else CUT,
        fontcolor="black" if kept else "#606060",
        style="filled,rounded" if kept else "filled,rounded,dashed",
        penwidth="2" if kept else "1",
    )
    _fast_weights(cluster, prefix, t + 1, step.fast_weights)
    cluster.edge(theta, loss)
    cluster.edge(theta, fast, weight="3")
    # The spaces keep a label off its arrow.
    if kept:
        emphasis = {"color": KEPT, "fontcolor": KEPT, "penwidth": "4"}
        cluster.edge(loss, gradient, label="  only in second order  ", **emphasis)
        cluster.edge(gradient, fast)
    else:
        number = {"color": CUT, "style": "dashed"}
        cluster.edge(loss, gradient, label="  number only  ", fontcolor=CUT, **number)
        cluster.edge(gradient, fast, **number)


def _fast_weights(cluster: graphviz.Digraph, prefix: str, t: int, theta: Tensor) -> None:
    values = _assignments(names(len(theta) - 1, str(t)), theta)
    text = _label("Fast weights", ["= parameters - inner_lr * gradient", *values])
    cluster.node(f"{prefix}_theta{t}", text, fillcolor=FILLS["fast"])


def _result(cluster: graphviz.Digraph, prefix: str, derivation: Derivation) -> None:
    """Write the meta-gradient under the query loss."""
    k, inputs = derivation.inner.steps, len(derivation.theta) - 1
    end = k if derivation.inner.first_order else 0
    title = "Meta-gradient, through the updates"
    if derivation.inner.first_order:
        title = "Meta-gradient, up to the fast weights"
    if k == 0:
        title = "Meta-gradient"
    lines = _assignments([f"dL_q/d{name}" for name in names(inputs, str(end))], derivation.autograd)
    result = f"{prefix}_result"
    cluster.node(result, _label(title, lines), shape="plaintext", style="", fillcolor="white")
    cluster.edge(f"{prefix}_query", result, style="invis")


def _assignments(symbols: Sequence[str], values: Tensor) -> list[str]:
    pairs = zip(symbols, values.tolist(), strict=True)
    return _shown([f"{symbol} = {value:.4g}" for symbol, value in pairs])


def _shown(texts: Sequence[str]) -> list[str]:
    """Keep a node readable: of many parameters, the first two and the bias."""
    return list(texts) if len(texts) <= 4 else [*texts[:2], "...", texts[-1]]


def _label(title: str, lines: Sequence[str]) -> str:
    return f"<<b>{title}</b><br/>{'<br/>'.join(lines)}>"
