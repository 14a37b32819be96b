"""`maml derive`: derive the first- and second-order meta-gradients of one linear unit, step by step."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from maml_pipeline.cli.parser import Parser
from maml_pipeline.derivation.derive import derive
from maml_pipeline.derivation.graph import check_graph_path, write_graph
from maml_pipeline.derivation.result import to_json
from maml_pipeline.derivation.text import to_text
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.tasks import Task, random_generator
from maml_pipeline.text import shortened

Points = list[list[float]]


def run(arguments: Sequence[str]) -> None:
    """Derive and print the meta-gradients, and draw their graphs if `--graph` is given.

    Args:
        arguments: The command-line arguments after `maml derive`.

    Raises:
        UserError: An argument is invalid, a value overflows the dtype, or autograd, the closed form
            and finite differences disagree.
    """
    settings = _parser().parse_args(_with_negative_numbers(arguments))
    graph = None if settings.graph is None else Path(settings.graph)
    if graph is not None:
        check_graph_path(graph)
    theta, task = _problem(settings)
    if not 0 < settings.outer_lr < math.inf:
        raise UserError(f"outer_lr is {settings.outer_lr}; it must be a number above 0")

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
                f"the {derivation.inner.order}-order meta-gradients disagree: " + "; ".join(wrong)
            )


def _parser() -> Parser:
    parser = Parser(
        prog="maml derive",
        description="Derive the first- and second-order meta-gradients of one linear unit with "
        "squared error on one task, step by step. Autograd is checked against the chain rule by hand "
        "and against finite differences.",
        epilog="example: maml derive --w0 -0.76 --inner_lr 0.1 --graph graph.svg",
    )
    points = "a number, a list (one per point) or a list of lists (the inputs of each point)"
    add = parser.add_argument
    add("--w0", help="initial weight, or a list with one per input; drawn with --seed if omitted")
    add("--b0", default="0", help="initial bias (default: 0)")
    add("--support_x", default="1", help=f"support inputs: {points} (default: 1)")
    add("--support_y", default="0", help="support targets: a number or a list (default: 0)")
    add("--query_x", default="2", help="query inputs, as for --support_x (default: 2)")
    add("--query_y", default="0", help="query targets: a number or a list (default: 0)")
    add("--inner_lr", type=float, default=1.0, help="inner learning rate alpha (default: 1)")
    add("--outer_lr", type=float, default=1.0, help="outer learning rate (default: 1)")
    add("--inner_steps", type=int, default=1, help="number of inner steps k, 0 or more (default: 1)")
    orders = ["true", "false", "both"]
    add("--first_order", choices=orders, default="both", help="order to derive (default: both)")
    add("--seed", type=int, default=0, help="seed for w0 (default: 0)")
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


def _problem(settings: argparse.Namespace) -> tuple[Tensor, Task]:
    """Build the initial parameters and the task.

    Returns:
        theta `(D + 1,)` and the task, in the chosen dtype.

    Raises:
        UserError: An argument is malformed, or their sizes do not match.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}[settings.dtype]
    support_x = _parse_points("support_x", settings.support_x)
    if settings.w0 is None:
        w0 = _random_weights(len(support_x[0]), settings.seed)
    else:
        w0 = [point[0] for point in _parse_points("w0", settings.w0, nested=False)]
    b0 = [point[0] for point in _parse_points("b0", settings.b0, nested=False)]
    if len(b0) != 1:
        raise UserError(f"b0 is {settings.b0}; a linear unit has one bias: give one number")

    inputs = len(w0)
    tensors = []
    for set_name in ("support", "query"):
        x = _parse_points(f"{set_name}_x", getattr(settings, f"{set_name}_x"))
        y = _parse_points(f"{set_name}_y", getattr(settings, f"{set_name}_y"), nested=False)
        if len(x[0]) != inputs:
            raise UserError(
                f"{set_name}_x has {len(x[0])} inputs per point, w0 has {inputs}; "
                f"give a list of points with {inputs} inputs each, such as {[[1] * inputs]}"
            )
        if len(x) != len(y):
            raise UserError(
                f"{set_name}_y has {len(y)} targets and {set_name}_x {len(x)} points; give one per point"
            )
        tensors += [_tensor(f"{set_name}_x", x, dtype), _tensor(f"{set_name}_y", y, dtype)]
    theta = torch.cat([_tensor("w0", w0, dtype), _tensor("b0", b0, dtype)])
    return theta, Task(*tensors)


def _random_weights(inputs: int, seed: int) -> list[float]:
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^64 - 1")
    draws: list[float] = random_generator(seed, "train", 0).standard_normal(inputs).tolist()
    return draws


def _parse_points(name: str, text: object, nested: bool = True) -> Points:
    """Read a number, a list of numbers or a list of equally long lists as a list of points."""
    form = "a number or a list of numbers such as [1, 2]"
    if nested:
        form += ", or a list of points such as [[1, 2], [3, 4]]"
    try:
        value = float(str(text))
    except ValueError:
        try:
            value = json.loads(str(text))
        except (ValueError, RecursionError):
            raise UserError(f"{name} is {shortened(text, 80)}; it must be {form}") from None
    points: Points = [
        point if nested and isinstance(point, list) else [point]
        for point in (value if isinstance(value, list) else [value])
    ]
    if not points or not all(
        point and len(point) == len(points[0]) and all(_is_number(v) for v in point) for point in points
    ):
        raise UserError(f"{name} is {shortened(text, 80)}; it must be {form}")
    return [[float(v) for v in point] for point in points]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tensor(name: str, value: Points | list[float], dtype: torch.dtype) -> Tensor:
    exact = torch.tensor(value, dtype=torch.float64)
    if not exact.isfinite().all():
        raise UserError(f"{name} holds {exact[~exact.isfinite()][0].item()}; it must be finite")
    tensor = exact.to(dtype)
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} holds {exact[~tensor.isfinite()][0].item()}, beyond float32's range; "
            "make it smaller or set dtype to float64"
        )
    return tensor
