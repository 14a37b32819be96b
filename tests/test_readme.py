"""The README's examples run as they stand."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs() -> None:
    (example,) = (block for block in blocks("python") if "gradient = " in block)
    namespace: dict[str, object] = {}
    exec(example, namespace)
    gradient = namespace["gradient"]
    assert isinstance(gradient, dict)
    assert gradient.keys() == {"weight", "bias"}


def test_your_own_tasks_and_network_plug_in_by_class_path(
    maml: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module,) = (block for block in blocks("python") if "class Parabolas" in block)
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if "my_tasks" in line)
    (tmp_path / "my_tasks.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)  # of another test
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    arguments = shlex.split(command)
    maml(*arguments[arguments.index("maml") + 1 :], "--trainer.max_steps", "5")
    (result,) = tmp_path.glob("runs/*/test.json")
    assert json.loads(result.read_text())["test/loss"] > 0


def test_every_file_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"\b(?:configs|scripts|docs)/[\w./]+\w", README))
    assert named
    assert all((ROOT / name).exists() for name in named), named
