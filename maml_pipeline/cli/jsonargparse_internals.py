"""Private parts of jsonargparse and of Lightning's command line: used here and nowhere else.

Each has one name and one reason; tests/test_internals_jsonargparse.py fails first when an upgrade
changes one.
"""

from typing import Any

from jsonargparse import ArgumentParser
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI


def parser_keys(parser: ArgumentParser) -> list[str]:
    """Return the keys of a parser and its subcommands, to suggest one for a misspelled key.

    jsonargparse has no public list of keys: defaults lack keys without one.
    """
    subcommands = parser._subcommands_action
    parsers = [parser, *(subcommands._name_parser_map.values() if subcommands else ())]
    return [action.dest for each in parsers for action in each._actions]


def has_subcommands(parser: ArgumentParser) -> bool:
    """Return whether a parser is the outermost one: it calls the `parse_args` of its subcommands."""
    return parser._subcommands_action is not None


class HookedCLI(LightningCLI):
    """Lightning's command line, with public hooks for private methods that this project needs."""

    def command_parser(self, command: str) -> LightningArgumentParser:
        """Return the parser of one command, to dump and read its settings."""
        return self._parser(command)

    def command_arguments(self, command: str) -> dict[str, Any]:
        """Return the keyword arguments for the trainer's method of this name."""
        return super()._prepare_subcommand_kwargs(command)

    def run_command(self, command: str) -> None:
        """Call the trainer's method of this name, and the hooks `before_...` and `after_...`."""
        super()._run_subcommand(command)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.command_arguments(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Do not read the checkpoint while parsing: this project's hold no hyperparameters."""
