"""docs/derivation.md shows what its commands print."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

DOC = (Path(__file__).parent.parent / "docs" / "derivation.md").read_text()
# Each console block is a command and, mostly, its output.
SHOWN = [
    (command, output)
    for command, output in re.findall(r"```console\n\$ (maml derive.*)\n([^`]*)```", DOC)
    if output
]


def test_the_document_shows_outputs() -> None:
    assert len(SHOWN) >= 7


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_a_command_prints_what_the_document_shows(
    command: str, output: str, maml: Callable[..., str]
) -> None:
    derive, _, tail = command.partition(" | tail -n ")
    lines = maml(*shlex.split(derive)[1:]).splitlines(keepends=True)
    assert "".join(lines[-int(tail or len(lines)) :]) == output


def test_output_fits_80_columns() -> None:
    assert max(len(line) for _, output in SHOWN for line in output.splitlines()) <= 80


def test_the_json_example_runs(maml: Callable[..., str]) -> None:
    (command,) = re.findall(r"\$ (maml derive.*--json)\n", DOC)
    assert '"second_order"' in maml(*shlex.split(command)[1:])


def test_the_python_example_prints_the_documented_output(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    exec(example, {})
    said = re.findall(r"print\(.*\)  # (.*)", example)
    assert capsys.readouterr().out.splitlines() == said
