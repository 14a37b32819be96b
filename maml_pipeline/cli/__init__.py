"""The `maml` command."""

import argparse
import gc
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from maml_pipeline import signals, slurm
from maml_pipeline.cli import elapsed, faults, training_help
from maml_pipeline.cli.known_keys import check_keys
from maml_pipeline.cli.known_values import check_values
from maml_pipeline.cli.late_imports import import_command
from maml_pipeline.cli.parser import Parser
from maml_pipeline.environment import check_environment
from maml_pipeline.errors import UserError
from maml_pipeline.signals import Response, Stopped
from maml_pipeline.text import printable_lines

COMMANDS = {
    "fit": "meta-train, then test the best checkpoint",
    "validate": "evaluate a checkpoint on the validation tasks",
    "test": "evaluate a checkpoint on the test tasks",
    "tradeoff": "train with both gradient orders and compare them",
    "submit": "submit a run or a trade-off to Slurm",
    "prepare": "download and pack the data of a config, for jobs without network access",
    "configs": "list the configs of the package, or print one",
    "runs": "list runs with their state and result",
    "report": "write a report comparing runs",
    "export": "write a run's network to a file for use elsewhere",
    "sync": "upload offline runs to W&B",
    "dashboard": "compare the gradient orders in a W&B workspace and report",
    "derive": "derive both meta-gradients of a small task, step by step",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the `maml` command in this process, which goes on afterwards.

    Args:
        argv: Arguments after the program's name; `None` for those of this process.
    """
    try:
        run(argv)
    finally:
        gc.unfreeze()


def run(argv: Sequence[str] | None = None) -> None:
    """Run the `maml` command, and leave what was imported exempt from garbage collection.

    Args:
        argv: Arguments after the program's name; `None` for those of this process.
    """
    elapsed.begin()
    # In a Slurm job a signal waits until the code that requeues the job is imported.
    with signals.listening(Response.NOTE if slurm.job_id() else Response.EXIT):
        try:
            _run_and_report_errors(argv)
        except (KeyboardInterrupt, SystemExit):  # Lightning turns one into the other
            signals.exit_if_interrupted()
            raise


def _run_and_report_errors(argv: Sequence[str] | None) -> None:
    try:
        _run(_parse(argv))
        signals.raise_if_requested()  # if something has swallowed the exception
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"maml: error: {printable_lines(error)}")
    except OSError as error:
        faults.exit_if_known(error)
        raise
    except Stopped as stop:
        _end_stopped(stop)


def _end_stopped(stop: Stopped) -> NoReturn:
    try:
        from maml_pipeline.cli.stopping import end_stopped  # late: it imports PyTorch
    except Exception:
        # The signal has interrupted the import of a library, which cannot be imported again.
        if not slurm.requeue(stop):
            name = "a signal" if stop.signum is None else stop.signum.name
            print(f"maml: stopped by {name} while it was starting", file=sys.stderr)
            sys.exit(stop.exit_status)
        sys.exit()
    end_stopped(stop)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="maml",
        usage="maml COMMAND ...",
        description="Few-shot meta-training with first- and second-order MAML.",
        examples=("maml fit --config toy", "maml report runs/toy-second-s0"),
        epilog="commands:\n"
        + "".join(f"  {name:<12}{text}\n" for name, text in COMMANDS.items())
        + "\n`maml COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"maml {version('maml-pipeline')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(2)
    return parser.parse_args(argv)


def _run(parsed: argparse.Namespace) -> None:
    command, arguments = parsed.command, parsed.arguments
    is_training = command in ("fit", "validate", "test")
    if is_training and training_help.is_asked_for(arguments):
        training_help.run(command)
    check_environment()
    if is_training:
        check_keys(arguments)
        check_values(arguments)
    module = import_command(command, arguments)
    signals.respond(Response.RAISE)
    signals.raise_if_requested()
    module.run(*([command] if is_training else []), arguments)
