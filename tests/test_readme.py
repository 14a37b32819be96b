"""The documents are correct: commands parse, examples run, links resolve."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torch.nn.functional import mse_loss

from maml_pipeline.cli import main
from maml_pipeline.environment import OMNIGLOT_ROOT
from tests.helpers import CONFIGS, ROOT, Maml
from tests.written_runs import write_search

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "slurm" / "README.md"],
)
"""Every document, for its links and the files that it names."""

WITH_COMMANDS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("python", "data", "recipes", "results", "training", "performance")
    ),
]
"""The documents whose commands are run as typed, with a stand-in for `maml`."""

RUNS = {
    "toy-second-s0": CONFIGS / "toy.yaml",
    "omniglot-5w1s-second-s0": CONFIGS / "omniglot" / "5way_1shot.yaml",
}
"""Runs that the commands assume to exist."""

STAND_INS = {
    "maml": """printf 'maml\\0' >> "$RECORD"; for each; do printf '%s\\0' "$each" >> "$RECORD"; done
printf '\\n\\0' >> "$RECORD" """,
    "torchrun": 'while [ "$1" != maml_pipeline ]; do shift; done; shift; exec maml "$@"',
    "bash": "exit 0",
    "pip": "exit 0",
    "wandb": "exit 0",
    "tensorboard": "exit 0",
}
"""Fake programs for the documents' commands; `maml` records its arguments."""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


def recorded_commands(shell: str, folder: Path) -> list[list[str]]:
    """Type the commands of all documents into a shell; return the arguments that `maml` receives."""
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "bin").mkdir()
    for name, script in STAND_INS.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    record = folder / "record"
    record.touch()
    for document in WITH_COMMANDS:
        for block in blocks(document, "bash"):
            result = subprocess.run(
                [path, "-e", "-u"],
                input=block,
                env={"PATH": str(folder / "bin"), "RECORD": str(record), "HOME": str(folder.parent)},
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert (result.returncode, result.stderr) == (0, ""), f"{document.name}, {shell}:\n{block}"
    commands: list[list[str]] = [[]]
    for word in record.read_text().split("\0")[:-1]:
        if word == "\n":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands[:-1]


class ParsedError(Exception):
    """The arguments of a command were accepted."""


def check_arguments(command: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments as the command does, without running it."""
    if command == "prepare" and "--config" in arguments:
        command = "fit"  # whose keys it takes
    if command in ("fit", "validate", "test"):
        with pytest.raises(SystemExit) as end:
            main([command, *arguments, "--print_config"])
        assert end.value.code in (0, None), end.value.code
    elif command in ("tradeoff", "submit"):
        main([command, "--dry_run", *(each for each in arguments if each != "--dry_run")])
    else:
        parse_args = argparse.ArgumentParser.parse_args

        def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
            parse_args(self, *args, **kwargs)
            raise ParsedError

        run = import_module(f"maml_pipeline.cli.{command}").run
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(ParsedError):
                run(arguments)


@pytest.mark.integration
def test_commands_are_the_same_in_bash_and_zsh(tmp_path: Path) -> None:
    folders = [tmp_path / shell for shell in ("bash", "zsh")]
    for folder in folders:
        folder.mkdir()
    in_bash, in_zsh = (recorded_commands(folder.name, folder) for folder in folders)
    assert len(in_bash) > 30
    assert in_zsh == in_bash


@pytest.mark.integration
def test_every_command_of_the_documents_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic_omniglot: Path
) -> None:
    commands = recorded_commands("bash", tmp_path)
    for document, begin, name in (
        ("README.md", "class Parabolas", "parabolas.py"),
        ("docs/recipes.md", "class Parabolas", "my_tasks.py"),
        ("docs/data.md", "class Letters", "my_data.py"),
        ("docs/data.md", "train_dataset", "three_folders.yaml"),
        ("docs/data.md", "EMNIST", "emnist.yaml"),
    ):
        language = "python" if name.endswith(".py") else "yaml"
        (block,) = (each for each in blocks(ROOT / document, language) if begin in each)
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("parabolas", "my_tasks", "my_data"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setenv(OMNIGLOT_ROOT.name, str(synthetic_omniglot))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    for name, config in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").symlink_to(config)
    rates = {0.05: 0.3, 0.1: 0.2, 0.2: 0.1}
    write_search(tmp_path / "runs" / "search", {"first": rates, "second": rates})
    for _, command, *arguments in commands:
        try:
            check_arguments(command, arguments, monkeypatch)
        except (AssertionError, SystemExit, pytest.fail.Exception) as error:
            pytest.fail(f"maml {' '.join([command, *arguments])}: {error}")


@pytest.mark.integration  # 500 meta-steps
def test_the_toy_run_prints_what_the_readme_shows_and_the_python_example_adapts_it(maml: Maml) -> None:
    (block,) = (each for each in blocks(ROOT / "README.md", "text") if each.startswith("Run folder"))
    lines = maml("fit", "--config", CONFIGS / "toy.yaml").splitlines()
    printed = [line.rstrip() for line in lines if "Meta-step" not in line and line.strip()]
    shown = block.splitlines()
    # The lines after the table tell how long it took, which varies.
    end = next(index for index, line in enumerate(printed) if line.startswith("└")) + 1
    assert printed[:end] == shown[:end]
    assert without_times(printed[end:]) == without_times(shown[end:])

    (example,) = (each for each in blocks(ROOT / "README.md", "python") if "from_run" in each)
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    query_y, prediction = namespace["task"].query_y, namespace["prediction"]
    assert mse_loss(prediction, query_y) < mse_loss(
        namespace["learner"](namespace["task"].query_x), query_y
    )


def without_times(lines: list[str]) -> list[str]:
    return [re.sub(r"(\d[\d.]* (d|h|min|s)\b ?)+", "TIME ", line) for line in lines]


@pytest.mark.integration  # jsonargparse starts a process to find a module's stubs
def test_your_own_tasks_and_network_plug_in_by_class_path(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = ROOT / "docs" / "recipes.md"
    (module,) = blocks(recipes, "python")
    (command,) = (block for block in blocks(recipes, "bash") if "my_tasks" in block)
    (tmp_path / "my_tasks.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)  # left by another test
    (tmp_path / "configs").symlink_to(CONFIGS)
    arguments = command.split()
    maml(*arguments[arguments.index("maml") + 1 :], "--trainer.max_steps", "5")
    (result,) = tmp_path.glob("runs/*/test.json")
    assert json.loads(result.read_text())["test/loss"] > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = document.parent / name if name else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{document.name} links to {target}"
    named = re.findall(r"(?<![\w/-])(?:configs|scripts|docs|tests|slurm|maml_pipeline)/[\w./-]+\w", text)
    # A name may be the beginning of a pattern, such as `tests/test_internals_*.py`.
    missing = [name for name in named if not list(ROOT.glob(f"{name}*"))]
    assert not missing


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
