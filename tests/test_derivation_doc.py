"""docs/derivation.md shows what its commands print."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

DOC = (Path(__file__).parent.parent / "docs" / "derivation.md").read_text()
TAIL = " | tail -n 1"
# Each console block is a command and, mostly, what it printed.
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
    printed = maml(*shlex.split(command.removesuffix(TAIL))[1:])
    if command.endswith(TAIL):
        printed = printed.splitlines(keepends=True)[-1]
    assert printed == output


def test_the_json_example_runs(maml: Callable[..., str]) -> None:
    (command,) = re.findall(r"\$ (maml derive.*--json)\n", DOC)
    assert '"second_order"' in maml(*shlex.split(command)[1:])


def test_the_python_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    exec(example, {})
    said = re.findall(r"print\(.*\)  # (.*)", example)
    assert capsys.readouterr().out.splitlines() == said
