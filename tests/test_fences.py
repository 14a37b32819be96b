"""Private parts of other libraries are used in one fenced file per library, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

FENCES = (
    "maml_pipeline/learner/lightning_internals.py",
    "maml_pipeline/torch_internals.py",
    "maml_pipeline/cli/jsonargparse_internals.py",
    "maml_pipeline/cli/python_internals.py",
    "maml_pipeline/learner/tracking/wandb_internals.py",
)
DOCUMENTED = {
    # The public methods of a named tuple begin with an underscore, so that they cannot be fields.
    *("_asdict", "_fields", "_field_defaults", "_make", "_replace"),
    # `os._exit` ends a process without the handlers that a forked one has inherited.
    "_exit",
}
FILES = [
    file
    for folder in ("maml_pipeline", "scripts", "examples", "tests")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if str(file.relative_to(ROOT)) not in FENCES and "test_internals_" not in file.name
]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined_in_classes(tree: ast.Module) -> set[str]:
    """Return the methods, fields and attributes that the classes of a module define."""
    names = set()
    for definition in ast.walk(tree):
        if not isinstance(definition, ast.ClassDef):
            continue
        for node in ast.walk(definition):
            match node:
                case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Assign(targets=targets):
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def violations(tree: ast.Module, inherited: set[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every private part of another object.

    Args:
        tree: A module.
        inherited: Names that classes of this repository define, so that `self` may have them.
    """
    own = defined_in_classes(tree) | DOCUMENTED
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                allowed = own | inherited
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                allowed = own | inherited
            case ast.Attribute(attr=name):
                allowed = own
            case ast.Call(func=function, args=[_, ast.Constant(value=str(name)), *_]):
                called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
                if called not in ("getattr", "setattr", "hasattr", "delattr"):
                    continue
                allowed = own | inherited
            case ast.Import(names=aliases):
                yield from ((node.lineno, a.name) for a in aliases if is_internal(a.name))
                continue
            case ast.ImportFrom(module=str(module), names=aliases):
                if is_internal(module):
                    yield node.lineno, module
                yield from ((node.lineno, a.name) for a in aliases if is_private(a.name))
                continue
            case _:
                continue
        if is_private(name) and name not in allowed:
            yield node.lineno, name


def is_internal(module: str) -> bool:
    return any(is_private(part) or part == "internal" for part in module.split("."))


@pytest.fixture(scope="module")
def inherited() -> set[str]:
    return set().union(*(defined_in_classes(ast.parse(file.read_text())) for file in FILES))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_private_parts_are_used_only_in_the_fenced_files(file: Path, inherited: set[str]) -> None:
    found = list(violations(ast.parse(file.read_text()), inherited))
    assert not found, f"(line, private name) outside {', '.join(FENCES)}"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("trainer._loop", "_loop"),
        ("self.trainer._loop", "_loop"),
        ("self._loop", "_loop"),
        ("super()._loop()", "_loop"),
        ("getattr(trainer, '_loop')", "_loop"),
        ("patch.setattr(Trainer, '_loop', None)", "_loop"),
        ("import torch._C", "torch._C"),
        ("from torch._C import x", "torch._C"),
        ("from wandb.internal import x", "wandb.internal"),
        ("from torch import _x", "_x"),
        ("class A:\n    def _loop(self): ...\na._loop()", None),
        ("task._replace(x=1)", None),
        ("trainer.__class__", None),
    ],
)
def test_private_parts_of_other_objects_are_detected(code: str, name: str | None) -> None:
    found = [found for _, found in violations(ast.parse(code), set())]
    assert found == ([name] if name else [])
