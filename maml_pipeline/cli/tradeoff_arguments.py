"""The arguments of `maml tradeoff`, which `maml submit --tradeoff` also takes."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maml_pipeline.cli.parser import Parser, path_argument

if TYPE_CHECKING:
    from maml_pipeline.tradeoff.devices import Parallel


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the settings of a trade-off, and the remaining arguments, which are those of `maml fit`."""
    parser = Parser(
        prog="maml tradeoff",
        usage="maml tradeoff --config FILE [--orders first,second] [--inner_steps 1,5] [--seeds 0,1] "
        "[--vary KEY=VALUE,... | --best_of DIR] [--out DIR] [--parallel N] "
        "[--dry_run | --cell N | --report] "
        "[--KEY VALUE ...]",
        description="Train and test each gradient order with each number of inner steps, each seed and "
        "each value of further keys, on the same tasks; then compare accuracy or loss, memory, time, "
        "FLOPs and order gap. Each combination is a cell: a run in its own process and folder. The same "
        "command resumes a trade-off that was stopped. All other keys are those of `maml fit`.",
        examples=(
            "maml tradeoff --config toy --inner_steps 1,5 --seeds 0,1",
            "maml tradeoff --config toy --dry_run",
            "maml tradeoff --config toy --vary model.inner_lr=0.1,0.2 --out runs/search",
            "maml tradeoff --config toy --best_of runs/search --seeds 0,1",
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--orders",
        type=lambda text: text.split(","),
        metavar="ORDER,...",
        help="any of first, truncated-N (only the last N inner steps are differentiated), second, "
        "checkpointed, hessian-free, truncated-N-checkpointed, truncated-N-hessian-free (default: "
        "first,second,checkpointed)",
    )
    add(
        "--inner_steps",
        type=_numbers,
        metavar="K,...",
        help="numbers of inner steps (default: the config's)",
    )
    add("--seeds", type=_numbers, metavar="N,...", help="seeds (default: the config's)")
    add(
        "--vary",
        action="append",
        default=[],
        type=varied_key,
        metavar="KEY=VALUE,...",
        help="another key of `maml fit` and its values; may be repeated. The report shows each order "
        "with the values that validated best",
    )
    add(
        "--best_of",
        type=path_argument,
        metavar="DIR",
        help="instead of --vary: folder of another trade-off with --vary, such as one with fewer "
        "meta-steps; train each order with the values that validated best there (default of --orders "
        "and --inner_steps: those trained there)",
    )
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="output folder (default: runs/<experiment>-tradeoff)",
    )
    add(
        "--parallel",
        type=_parallel,
        metavar="N",
        help="cells to train side by side, each on a GPU of its own or with its share of the CPU cores; "
        "auto: one per GPU (default: 1)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry_run", action="store_true", help="list the cells without training")
    mode.add_argument("--cell", type=int, metavar="N", help="train only cell N, counted from 0")
    mode.add_argument("--report", action="store_true", help="compare the cells without training")
    # Set by `maml submit` for its jobs: the cells as they were submitted, in place of all settings.
    add("--submitted", type=path_argument, help=argparse.SUPPRESS)
    settings, others = parser.parse_known_args(arguments)
    if settings.best_of is not None and settings.vary:
        parser.error("argument --best_of: not allowed with argument --vary; leave one of them out")
    return settings, others


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number or a comma-separated list of whole numbers"
        ) from None


def _parallel(text: str) -> "Parallel":
    if text == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1, or auto")
    return number


def varied_key(text: str) -> tuple[str, list[str]]:
    """Split `KEY=VALUE,...` into the key and its values."""
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--")
    if not key or not equals:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be KEY=VALUE,VALUE, as in model.inner_lr=0.1,0.4"
        )
    found = [value.strip() for value in _split(values)]
    if "" in found:
        raise argparse.ArgumentTypeError(f"{key} has an empty value; write {key}=VALUE,VALUE")
    return key, found


def _split(text: str) -> Iterator[str]:
    """Split at commas, but not inside of brackets or quotes."""
    start, depth, quote = 0, 0, ""
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in ")}]":
            depth -= 1
        elif char == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]
