"""The layers of the package: imports go downwards only, and no modules import each other in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import maml_pipeline

ROOT = Path(maml_pipeline.__file__).parent
LAYERS = (
    *("cli", "tradeoff", "report", "runs", "learner", "derivation"),
    *("meta_gradient", "tasks", "slurm", "networks"),
)
"""From top to bottom. Below them all lie the modules of the package's own folder."""

ENTRANCES = ("maml_pipeline", "maml_pipeline.__main__")
"""What a user imports or starts; they stand above every layer, and no layer imports them."""

PLAIN_LAYERS = ("meta_gradient", "tasks", "networks")
FRAMEWORKS = {
    "jsonargparse",
    "lightning_fabric",
    "pytorch_lightning",
    "rich",
    "wandb",
    "wandb_workspaces",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Return the modules of this package, and the names of other packages, that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} has a relative import"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names.values()}
    return {name if name in MODULES else name.partition(".")[0] for name in found}


def layer_of(module: str) -> int:
    """Return how far up a module lies; 0 for the package's own modules."""
    if module in ENTRANCES:
        return len(LAYERS) + 1
    name = module.split(".")[1]
    if name in LAYERS:
        return len(LAYERS) - LAYERS.index(name)
    assert MODULES[module].parent == ROOT, f"{MODULES[module].parent} is no layer: name it in LAYERS"
    return 0


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    allowed = layer_of(module)
    own = {name for name in imports(module) if name in MODULES}
    upwards = [name for name in own if layer_of(name) > allowed and name != "maml_pipeline"]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's __init__ imports its modules; a module that imports its package would close a circle.
    graph = {module: imports(module) & MODULES.keys() for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.split(".")[1:2] and m.split(".")[1] in PLAIN_LAYERS]
)
def test_plain_pytorch_knows_no_framework(module: str) -> None:
    assert not imports(module) & FRAMEWORKS
