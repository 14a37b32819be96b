"""Environment variables: all listed in one file, validated, and untouched by an import."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import maml_pipeline
from maml_pipeline import environment
from maml_pipeline.environment import SCRIPT_VARIABLES, Variable
from maml_pipeline.errors import UserError

PACKAGE = Path(maml_pipeline.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SHELL_SCRIPTS = [*sorted((ROOT / "slurm").glob("*.*")), *sorted((ROOT / "scripts").glob("*.sh"))]
VARIABLES = [*environment.RANKS, *(v for v in vars(environment).values() if isinstance(v, Variable))]

IMPORT_EVERYTHING = """
import importlib, os, pkgutil
import jsonargparse, learn2learn, matplotlib.pyplot, pytorch_lightning, torch._inductor, torchvision
import wandb
import wandb_workspaces.reports.v2
before = dict(os.environ)
import maml_pipeline
for module in pkgutil.walk_packages(maml_pipeline.__path__, "maml_pipeline."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print({name for name in before.keys() | os.environ if before.get(name) != os.environ.get(name)})
"""


@pytest.mark.integration
def test_importing_the_package_sets_no_variable() -> None:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_EVERYTHING]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_read_variables_through_the_list(module: Path) -> None:
    if module == Path(environment.__file__):
        return
    tree = ast.parse(module.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "getenv", "putenv"}


def test_every_variable_of_the_shell_scripts_is_listed() -> None:
    listed = {variable.name for variable in VARIABLES} | SCRIPT_VARIABLES.keys()
    for script in SHELL_SCRIPTS:
        text = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("#S"))
        used = set(re.findall(r"\b((?:MAML|SLURM|WANDB|OMP|MASTER)_[A-Z_]+)\b", text))
        assert used <= listed, script.name


def test_every_listed_variable_is_used() -> None:
    sources = [*MODULES, *SHELL_SCRIPTS, *(ROOT / "scripts").glob("*.py")]
    sources.remove(Path(environment.__file__))
    text = "\n".join(source.read_text() for source in sources)
    constants = {name for name, value in vars(environment).items() if isinstance(value, Variable)}
    for constant in constants:
        name = getattr(environment, constant).name
        assert re.search(rf"\b({constant}|{name})\b", text), constant
    for name in SCRIPT_VARIABLES:
        assert name in text, name


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (environment.OFFLINE, "1", True),
        (environment.OFFLINE, "TRUE", True),
        (environment.OFFLINE, "0", False),
        (environment.OFFLINE, "", False),
        (environment.OMNIGLOT_ROOT, "~/data", Path("~/data")),
        (environment.OMNIGLOT_ROOT, "", Path("data/omniglot")),
        (environment.GPUS_PER_NODE, "4", 4),
        (environment.SLURM_RESTART_COUNT, "", 0),
        (environment.WANDB_MODE, "offline", "offline"),
        (environment.WANDB_MODE, "", None),
    ],
)
def test_a_variable_has_a_type_and_a_default(
    variable: Variable[object], text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    assert variable.get() == value
    if not text:
        monkeypatch.delenv(variable.name)
        assert variable.get() == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "first"),
        ("SLURM_PROCID", "-1"),
        ("MAML_OFFLINE", "maybe"),
        ("WANDB_MODE", "ofline"),
        ("WANDB_DISABLED", "2"),
    ],
)
def test_a_malformed_value_is_one_line_before_anything_is_written(
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    maml_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(name, value)
    error = maml_error("fit", "--config", ROOT / "configs" / "toy.yaml")
    assert f"environment variable {name} is {value}; it must be " in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0", "-1", "many", "²"])
def test_gpus_per_node_must_be_positive(text: str) -> None:
    with pytest.raises(UserError, match=f"MAML_GPUS_PER_NODE is {text}; it must be a number from 1"):
        environment.GPUS_PER_NODE.parse(text)


def test_a_default_for_a_library_does_not_outlive_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = environment.KINETO_LOG_LEVEL
    monkeypatch.delenv(variable.name, raising=False)
    with variable.defaulting_to("99"):
        assert variable.get() == "99"
    assert not variable.is_set()
    monkeypatch.setenv(variable.name, "3")
    with variable.defaulting_to("99"):
        assert variable.get() == "3"
    assert variable.get() == "3"


def test_a_child_process_inherits_all_but_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    inherited = environment.child_environment(WANDB_RUN_ID=None, WANDB_RESUME="allow")
    rest = {name: value for name, value in os.environ.items() if name != "WANDB_RUN_ID"}
    assert inherited == rest | {"WANDB_RESUME": "allow"}
