"""A wrong value is refused before PyTorch is imported, with the message that the parser would give."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.cli.checked_command import CheckedCommand
from maml_pipeline.cli.known_values import check_values, plain_types
from maml_pipeline.cli.ranges import check_ranges
from maml_pipeline.errors import UserError
from maml_pipeline.shipped_files import shipped_configs
from tests.bad_inputs import KEYS


class ValuesOnly(CheckedCommand):
    """Parses the arguments of a command and checks the ranges of the values."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_ranges(self.settings)
        raise KeyError  # nothing is to be built


def message(check: Callable[[], object]) -> str | None:
    """Return the error of a check; `None` if there is none."""
    try:
        check()
    except UserError as error:
        return str(error)
    except KeyError:
        pass
    return None


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.inner_lr", "fast"), ("model.inner_lr", "1e-2"), ("trainer.max_steps", "-2")]
    + [
        pytest.param(key, value, marks=pytest.mark.exhaustive)
        for key, values in KEYS.items()
        if key in plain_types()
        for value in shlex.split(values)
    ],
)
@pytest.mark.parametrize("is_in_a_file", [False, True])
def test_a_wrong_value_has_the_message_that_the_parser_would_give(
    key: str, value: str, is_in_a_file: bool, tmp_path: Path
) -> None:
    arguments = ["--config", "toy", f"--{key}={value}"]
    if is_in_a_file:
        group, _, name = key.partition(".")
        (tmp_path / "wrong.yaml").write_text(f"{group}: {{{name}: {value or repr(value)}}}")
        arguments = ["--config", "toy", "--config", str(tmp_path / "wrong.yaml")]
    early = message(lambda: check_values(arguments))
    late = message(lambda: ValuesOnly("fit", arguments))
    if value == "null" and is_in_a_file and early is None:
        assert late is None or late.startswith("no value for")  # which is left to the parser
    else:
        assert early == late


@pytest.mark.parametrize(
    "later",
    [
        ["--model", "{inner_steps: 3}"],
        ["--model={inner_steps: 3}"],
        ["--config", '{"model": {"inner_steps": 3}}'],
        ["--model.inner_steps", "3"],
    ],
)
def test_a_wrong_value_that_is_replaced_is_left_to_the_parser(tmp_path: Path, later: list[str]) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {inner_steps: 20000}")
    wrong = ["--config", "toy", "--config", str(tmp_path / "wrong.yaml")]
    check_values([*wrong, *later])
    with pytest.raises(UserError, match=r"model\.inner_steps is 20000; it must be at most 10,000"):
        check_values(wrong)


def test_a_flag_without_its_value_is_left_to_the_parser() -> None:
    check_values([])
    check_values(["--config", "toy", "--model.first_order", "--trainer.max_steps=5"])


def test_the_last_value_of_a_key_counts(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("model: {inner_lr: fast}")
    wrong, right = ["--config", str(tmp_path / "wrong.yaml")], ["--model.inner_lr", "0.1"]
    check_values([*wrong, *right])
    with pytest.raises(UserError, match=r"model\.inner_lr is fast; it must be a number"):
        check_values([*right, *wrong])


@pytest.mark.parametrize("config", shipped_configs())
def test_every_shipped_config_has_valid_values(config: str) -> None:
    check_values(["--config", config])
