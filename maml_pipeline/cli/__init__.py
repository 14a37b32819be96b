"""The `maml` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from maml_pipeline.errors import UserError
from maml_pipeline.text import printable_lines

COMMANDS = {
    "fit": "meta-train, then test the best checkpoint",
    "validate": "measure a checkpoint on the validation tasks",
    "test": "measure a checkpoint on the test tasks",
    "tradeoff": "train with every gradient order, inner steps and seeds, and compare",
    "submit": "put a training or a trade-off into the queue of a Slurm cluster",
    "prepare": "download and pack a data set, before jobs read it where there is no network",
    "report": "write a report comparing runs, finished or not",
    "sync": "upload runs that were kept offline to W&B",
    "dashboard": "make the comparison of the orders ready in W&B",
    "derive": "work out both orders' meta-gradients on one task, and draw their graphs",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `maml` command.

    Args:
        argv: Arguments after the program's name; `None` for those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="maml",
        usage="maml COMMAND --config FILE [--config OVERLAY] [--KEY VALUE ...]",
        description="Few-shot meta-training with first- and second-order MAML.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        + "\n\n`maml COMMAND --help` lists every key; configs/ holds whole, commented configs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"maml {version('maml-pipeline')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)

    # Late: Lightning takes seconds to import, `maml --help` must not.
    try:
        match parsed.command:
            case "fit" | "validate" | "test" as name:
                import_module("maml_pipeline.cli.training").run(name, parsed.arguments)
            case name:
                import_module(f"maml_pipeline.cli.{name}").run(parsed.arguments)
    except UserError as error:
        # Names and paths in it may hold control characters, which a terminal would obey.
        sys.exit(f"maml: error: {printable_lines(error)}")
