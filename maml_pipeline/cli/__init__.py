"""The `maml` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from maml_pipeline import signals, slurm
from maml_pipeline.cli import faults
from maml_pipeline.environment import check_environment
from maml_pipeline.errors import UserError
from maml_pipeline.signals import Response, Stopped
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
    # In a Slurm job a signal waits until the code that requeues the job is imported.
    with signals.listening(Response.NOTE if slurm.job_id() else Response.EXIT):
        try:
            _run_to_its_end(argv)
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one into the other
            signals.exit_if_interrupted()
            raise


def _run_to_its_end(argv: Sequence[str] | None) -> None:
    try:
        _run(_parse(argv))
        signals.raise_if_requested()  # where something on the way has swallowed the exception
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"maml: error: {printable_lines(error)}")
    except OSError as error:
        faults.exit_if_known(error)
        raise
    except Stopped as stop:
        import_module("maml_pipeline.cli.stopping").end_stopped(stop)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(argv)


def _run(parsed: argparse.Namespace) -> None:
    is_training = parsed.command in ("fit", "validate", "test")
    # Late: Lightning takes seconds to import, `maml --help` must not.
    check_environment()
    module = import_module(f"maml_pipeline.cli.{'training' if is_training else parsed.command}")
    signals.respond(Response.RAISE)
    signals.raise_if_requested()
    module.run(*([parsed.command] if is_training else []), parsed.arguments)
