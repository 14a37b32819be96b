"""Draw the computation graphs of the two gradient orders side by side, with Graphviz."""

from collections.abc import Sequence
from pathlib import Path

import graphviz
from torch import Tensor

from maml_pipeline.derivation.result import Derivation, InnerStep, parameter_names
from maml_pipeline.errors import UserError
from maml_pipeline.files import write_atomically

SUFFIXES = (".svg", ".png", ".dot")

# Okabe and Ito's palette, which colour-blind readers can tell apart.
SECOND_ORDER_ONLY = "#D55E00"
DETACHED = "#8A8A8A"
FILLS = {"initial": "#56B4E9", "fast": "#A6DCC8", "loss": "#F5E6A8", "gradient": "#FFFFFF"}
FONT = "Helvetica,Arial,sans-serif"


def check_graph_path(path: Path) -> None:
    """Check that a graph can be written to a path.

    Raises:
        UserError: The suffix is not one of `SUFFIXES`, or the folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"graph is {path}; its name must end in {', '.join(SUFFIXES[:-1])} or .dot")
    if not path.parent.is_dir():
        raise UserError(f"graph is {path}; the folder {path.parent} does not exist, create it first")


def write_graph(derivations: Sequence[Derivation], path: Path) -> None:
    """Draw derivations of one task side by side and write the picture.

    Args:
        derivations: First order, second order or both, in this sequence.
        path: Output file; the suffix selects the format: .svg, .png, or .dot for Graphviz's source.

    Raises:
        UserError: The path cannot be written, or Graphviz's program `dot` is not installed.
    """
    check_graph_path(path)
    graph = computation_graph(derivations)
    if path.suffix == ".png":
        # Only here: Graphviz scales an SVG's drawing by dpi but not its viewBox, which crops it.
        graph.graph_attr["dpi"] = "110"
    if path.suffix == ".dot":
        picture = graph.source.encode()
    else:
        try:
            picture = graph.pipe(format=path.suffix[1:])
        except graphviz.ExecutableNotFound as error:
            raise UserError(
                f"graph is {path}; drawing it needs Graphviz's program `dot`: install it (apt install "
                "graphviz, brew install graphviz or conda install graphviz), or write "
                f"{path.with_suffix('.dot')}, which does not need it"
            ) from error
    try:
        write_atomically(path, picture)
    except OSError as error:
        raise UserError(f"graph is {path}; it cannot be written: {error.strerror}") from error


def computation_graph(derivations: Sequence[Derivation]) -> graphviz.Digraph:
    """Build the graphs, one cluster per order.

    Of more than three inner steps, the first and the last are drawn; one node stands for the others.

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
            _add_order(cluster, derivation)
    return graph


def _caption(derivations: Sequence[Derivation]) -> str:
    lines = ["Arrows lead from a value to what is computed from it; gradients flow back along them."]
    if derivations[0].inner.steps > 0:
        lines.append("A dashed arrow passes on the number alone: no gradient flows back along it.")
    return "\\l".join(["", *lines, ""])


def _add_order(cluster: graphviz.Digraph, derivation: Derivation) -> None:
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
        _label("Initial parameters", _assignments(parameter_names(inputs, "0"), derivation.theta)),
        fillcolor=FILLS["initial"],
    )

    steps = list(enumerate(derivation.inner_steps))
    k = len(steps)
    abbreviated = k > 3
    for t, step in [steps[0], steps[-1]] if abbreviated else steps:
        _add_inner_step(cluster, prefix, t, step, k)
    if abbreviated:
        _add_fast_weights(cluster, prefix, k - 1, derivation.inner_steps[-1].theta)
        between = f"{prefix}_between"
        cluster.node(between, f"inner steps 2 to {k - 1}", shape="plaintext", style="")
        cluster.edge(f"{prefix}_theta1", between, style="dotted", arrowhead="none")
        cluster.edge(between, f"{prefix}_theta{k - 1}", style="dotted")

    arguments = ", ".join(_abbreviate(parameter_names(inputs, str(k))))
    loss = f"L_q({arguments}) = {derivation.query_loss.item():.4g}"
    cluster.node(f"{prefix}_query", _label("Query loss", [loss]), fillcolor=FILLS["loss"])
    cluster.edge(f"{prefix}_theta{k}", f"{prefix}_query")
    _add_meta_gradient(cluster, prefix, derivation)


def _add_inner_step(cluster: graphviz.Digraph, prefix: str, t: int, step: InnerStep, k: int) -> None:
    before = parameter_names(len(step.theta) - 1, str(t))
    theta, loss, gradient, fast = (
        f"{prefix}_{name}" for name in (f"theta{t}", f"loss{t}", f"gradient{t}", f"theta{t + 1}")
    )
    title = "Support loss" if k == 1 else f"Support loss, inner step {t + 1}"
    value = f"L_s({', '.join(_abbreviate(before))}) = {step.support_loss.item():.4g}"
    cluster.node(loss, _label(title, [value]), fillcolor=FILLS["loss"])
    values = _assignments([f"dL_s/d{name}" for name in before], step.support_gradient)
    attached = step.requires_grad
    cluster.node(
        gradient,
        _label("Support gradient", [*values, f"requires_grad={attached}"]),
        fillcolor=FILLS["gradient"],
        color=SECOND_ORDER_ONLY if attached else DETACHED,
        fontcolor="black" if attached else "#606060",
        style="filled,rounded" if attached else "filled,rounded,dashed",
        penwidth="2" if attached else "1",
    )
    _add_fast_weights(cluster, prefix, t + 1, step.fast_weights)
    cluster.edge(theta, loss)
    cluster.edge(theta, fast, weight="3")
    # Spaces keep a label off its arrow.
    if attached:
        emphasis = {"color": SECOND_ORDER_ONLY, "fontcolor": SECOND_ORDER_ONLY, "penwidth": "4"}
        cluster.edge(loss, gradient, label="  only in second order  ", **emphasis)
        cluster.edge(gradient, fast)
    else:
        number = {"color": DETACHED, "style": "dashed"}
        cluster.edge(loss, gradient, label="  number only  ", fontcolor=DETACHED, **number)
        cluster.edge(gradient, fast, **number)


def _add_fast_weights(cluster: graphviz.Digraph, prefix: str, t: int, theta: Tensor) -> None:
    values = _assignments(parameter_names(len(theta) - 1, str(t)), theta)
    text = _label("Fast weights", ["= parameters - inner_lr * gradient", *values])
    cluster.node(f"{prefix}_theta{t}", text, fillcolor=FILLS["fast"])


def _add_meta_gradient(cluster: graphviz.Digraph, prefix: str, derivation: Derivation) -> None:
    """Write the meta-gradient under the query loss."""
    k, first = derivation.inner.steps, derivation.inner.first_order
    names = parameter_names(len(derivation.theta) - 1, str(k if first else 0))
    path = ", stopping at the fast weights" if first else ", through the inner steps"
    title = f"Meta-gradient{path if k > 0 else ''}"
    lines = _assignments([f"dL_q/d{name}" for name in names], derivation.autograd)
    result = f"{prefix}_result"
    cluster.node(result, _label(title, lines), shape="plaintext", style="", fillcolor="white")
    cluster.edge(f"{prefix}_query", result, style="invis")


def _assignments(symbols: Sequence[str], values: Tensor) -> Sequence[str]:
    pairs = zip(symbols, values.tolist(), strict=True)
    return _abbreviate([f"{symbol} = {value:.4g}" for symbol, value in pairs])


def _abbreviate(texts: Sequence[str]) -> Sequence[str]:
    """Keep a node small: of more than four parameters, the first two and the bias."""
    return texts if len(texts) <= 4 else [*texts[:2], "...", texts[-1]]


def _label(title: str, lines: Sequence[str]) -> str:
    return f"<<b>{title}</b><br/>{'<br/>'.join(lines)}>"
