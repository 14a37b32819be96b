"""`maml derive`: derive the first- and second-order meta-gradients of one linear unit, step by step."""

import sys
from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.cli.parser import Parser
from maml_pipeline.errors import UserError
from maml_pipeline.limits import check_positive


def run(arguments: Sequence[str]) -> None:
    """Derive and print the meta-gradients, and draw their graphs if `--graph` is given.

    Args:
        arguments: The command-line arguments after `maml derive`.

    Raises:
        UserError: An argument is invalid, a value overflows the dtype, or autograd, the closed form
            and finite differences disagree.
    """
    settings = _parser().parse_args(_with_negative_numbers(arguments))
    # Imported late: PyTorch takes seconds to import, which help must not.
    from maml_pipeline.cli.derive_arguments import parameters_and_task
    from maml_pipeline.derivation.derive import derive
    from maml_pipeline.derivation.graph import check_graph_path, write_graph
    from maml_pipeline.derivation.result import to_json
    from maml_pipeline.derivation.text import to_text
    from maml_pipeline.meta_gradient import InnerLoop

    graph = None if settings.graph is None else Path(settings.graph)
    if graph is not None:
        check_graph_path(graph)
    theta, task = parameters_and_task(settings)
    check_positive("outer_lr", settings.outer_lr)

    orders = {"true": [True], "false": [False], "both": [True, False]}[settings.first_order]
    loops = [InnerLoop(settings.inner_lr, settings.inner_steps, order) for order in orders]
    derivations = [derive(theta, task, inner, settings.outer_lr) for inner in loops]
    print(to_json(derivations) if settings.json else to_text(derivations))
    if graph is not None:
        write_graph(derivations, graph)
        print(f"Graph: {graph}", file=sys.stderr)

    for derivation in derivations:
        if wrong := derivation.disagreements():
            raise UserError(
                f"the {derivation.inner.order.degree}-order meta-gradients disagree: " + "; ".join(wrong)
            )


def _parser() -> Parser:
    parser = Parser(
        prog="maml derive",
        description="Derive the first- and second-order meta-gradients of one linear unit with "
        "squared error on one task, step by step. Autograd is checked against the chain rule by hand "
        "and against finite differences.",
        examples=("maml derive --w0 -0.76 --inner_lr 0.1 --graph graph.svg",),
    )
    points = "a number, a list (one per point) or a list of lists (the inputs of each point)"
    add = parser.add_argument
    add(
        "--w0",
        metavar="W",
        help="initial weight, or a list with one per input; drawn with --seed if omitted",
    )
    add("--b0", metavar="B", default="0", help="initial bias (default: 0)")
    add("--support_x", metavar="X", default="1", help=f"support inputs: {points} (default: 1)")
    add("--support_y", metavar="Y", default="0", help="support targets: a number or a list (default: 0)")
    add("--query_x", metavar="X", default="2", help="query inputs, as for --support_x (default: 2)")
    add("--query_y", metavar="Y", default="0", help="query targets: a number or a list (default: 0)")
    add(
        "--inner_lr",
        metavar="LR",
        type=float,
        default=1.0,
        help="inner learning rate alpha (default: 1)",
    )
    add("--outer_lr", metavar="LR", type=float, default=1.0, help="outer learning rate (default: 1)")
    add(
        "--inner_steps",
        metavar="K",
        type=int,
        default=1,
        help="number of inner steps k, 0 or more (default: 1)",
    )
    orders = ["true", "false", "both"]
    add("--first_order", choices=orders, default="both", help="order to derive (default: both)")
    add("--seed", metavar="N", type=int, default=0, help="seed for w0 (default: 0)")
    dtypes = ["float32", "float64"]
    add("--dtype", choices=dtypes, default="float32", help="floating-point dtype (default: float32)")
    add("--json", action="store_true", help="print all numbers as one JSON object instead")
    add("--graph", metavar="FILE", help="draw the computation graphs to an .svg, .png or .dot file")
    return parser


def _with_negative_numbers(arguments: Sequence[str]) -> list[str]:
    """Join `--w0 -1e-5` to `--w0=-1e-5`, because argparse mistakes such numbers for options."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _is_negative(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _is_negative(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.startswith("-")
