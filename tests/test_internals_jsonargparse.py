"""Canaries for cli/jsonargparse_internals.py: they fail first when an upgrade changes a private part."""

import inspect
from importlib.metadata import version

import jsonargparse
from pytorch_lightning.cli import LightningCLI

from maml_pipeline.cli.jsonargparse_internals import HookedCLI, has_subcommands, parser_keys

JSONARGPARSE = f"jsonargparse {version('jsonargparse')} changed {{}}: see cli/jsonargparse_internals.py"
LIGHTNING = f"Lightning {version('pytorch-lightning')} changed {{}}: see cli/jsonargparse_internals.py"


def test_parser_keys_lists_the_keys_of_a_parser_and_its_subcommands() -> None:
    command = jsonargparse.ArgumentParser()
    command.add_argument("--inner.key", type=int)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--outer", type=int)
    parser.add_subcommands().add_subcommand("command", command)
    try:
        keys = parser_keys(parser)
    except AttributeError as error:
        raise AssertionError(JSONARGPARSE.format(error)) from error
    assert {"outer", "inner.key"} <= {*keys}, JSONARGPARSE.format("the list of a parser's actions")
    assert "inner.key" in parser_keys(command)
    assert has_subcommands(parser) and not has_subcommands(command)


def test_lightning_calls_the_hooks() -> None:
    for name in ("_parser", "_prepare_subcommand_kwargs", "_run_subcommand", "_parse_ckpt_path"):
        assert hasattr(LightningCLI, name), LIGHTNING.format(name)
    source = inspect.getsource(LightningCLI)
    for call in (
        "self._prepare_subcommand_kwargs(subcommand)",
        "self._run_subcommand(self.subcommand)",
        "self._parse_ckpt_path()",
    ):
        assert call in source, LIGHTNING.format(call)


def test_the_hooks_take_what_lightning_passes() -> None:
    for private, public in (
        ("_parser", "command_parser"),
        ("_prepare_subcommand_kwargs", "command_arguments"),
        ("_run_subcommand", "run_command"),
    ):
        theirs = inspect.signature(getattr(LightningCLI, private)).parameters
        ours = inspect.signature(getattr(HookedCLI, public)).parameters
        assert len(theirs) == len(ours), LIGHTNING.format(private)
