"""Refuse a misspelled key of a training before PyTorch and Lightning are imported, which takes seconds.

The keys are read from the source code: those of a group, such as `trainer`, are the arguments of a
class. What lies below them, such as the arguments of a network, the parser checks.
"""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from maml_pipeline.cli.config_files import check_config_files, config_files, find_shipped
from maml_pipeline.cli.suggestions import suggest, unknown_key
from maml_pipeline.config_file import read_config
from maml_pipeline.errors import UserError
from maml_pipeline.garbage import collector_paused

GROUPS = {
    "trainer": ("pytorch_lightning", "trainer/trainer.py", "Trainer"),
    "model": ("maml_pipeline", "learner/meta_learner.py", "MetaLearner"),
    "data": ("maml_pipeline", "learner/data.py", "TaskDataModule"),
    "run": ("maml_pipeline", "run_folder.py", "RunSettings"),
    "probes": ("maml_pipeline", "learner/probes/__init__.py", "ProbeSettings"),
}
"""The package, file and class whose arguments are the keys of a group."""

SINGLE = ("config", "seed_everything", "ckpt_path")
"""The keys outside groups."""

LEFT_TO_THE_PARSER = ("-h", "-c", "--help", "--print_config")
"""Flags of which the parser alone knows what follows them, as of `--KEY.help`."""


def check_keys(arguments: Sequence[str]) -> None:
    """Check the keys of a training's arguments and configuration files, in their first two parts.

    Args:
        arguments: The arguments after the command.

    Raises:
        UserError: A key does not exist, or a file cannot be read.
    """
    arguments = find_shipped(arguments)
    check_config_files(arguments)
    if is_left_to_the_parser(arguments):
        return
    keys = known_keys()
    unrecognized = [*_unrecognized(arguments, keys)]
    message = ""
    if any(argument.startswith("--") for argument in unrecognized):
        message = f"unrecognized arguments: {' '.join(unrecognized)}"
    elif key := next(_unknown_in_files(arguments, keys), None):
        message = unknown_key(key)
    if message:
        with collector_paused():  # the classes of a config have arguments to suggest
            raise UserError(message + suggest(message, keys, arguments))


def is_left_to_the_parser(arguments: Sequence[str]) -> bool:
    """Tell whether there is a flag of which the parser alone knows what follows it."""
    flags = [argument.partition("=")[0] for argument in arguments]
    return any(flag in LEFT_TO_THE_PARSER or flag.endswith(".help") for flag in flags)


@cache
def known_keys() -> list[str]:
    """Return the keys of a training in their first two parts, such as `model.inner_lr`."""
    keys = [*SINGLE]
    for group, source in GROUPS.items():
        keys += [group, *(f"{group}.{name}" for name in arguments_of(*source))]
    return keys


@cache
def arguments_of(package: str, file: str, name: str) -> dict[str, ast.expr | None]:
    """Return the arguments of a class with their annotations: of its constructor, or its fields.

    Args:
        package: Its package, which is not imported.
        file: Its file in the package.
        name: Its name.
    """
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            own = [*node.args.args, *node.args.kwonlyargs][1:]
            return {argument.arg: argument.annotation for argument in own}
    fields = [n for n in body if isinstance(n, ast.AnnAssign)]
    return {n.target.id: n.annotation for n in fields if isinstance(n.target, ast.Name)}


def _is_known(key: str, keys: Sequence[str]) -> bool:
    group, _, rest = key.partition(".")
    return key in keys or f"{group}.{rest.partition('.')[0]}" in keys


def _unrecognized(arguments: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """Yield unknown flags with what follows them, and words that are no flag's value."""
    takes_value = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if not argument.startswith("--"):
            if not takes_value:
                yield argument
            takes_value = False
        elif _is_known(flag.removeprefix("--").removesuffix("+"), keys):
            takes_value = not equals
        else:
            yield argument
            takes_value = False


def _unknown_in_files(arguments: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    """Yield the unknown keys of the configuration files."""
    files = [file for file in config_files(arguments) if not file.lstrip().startswith("{")]
    for values in (read_config(Path(file), "config") for file in files):
        for group, value in values.items():
            names = [f"{group}.{name}" for name in value] if isinstance(value, dict) else [str(group)]
            yield from (key for key in names if not _is_known(key, keys))
