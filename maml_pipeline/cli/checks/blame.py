"""Find the argument that keeps a class from being built, by leaving out one at a time."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import Namespace

from maml_pipeline.errors import first_line

LONGEST = 200


def short_reason(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters."""
    text = first_line(error)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def refusal(key: str, spec: Any, error: Exception, use: Callable[..., object]) -> str:
    """Return a message that names the setting which a configured class refuses, and why.

    Args:
        key: The key of the class, such as `model.optimizer`.
        spec: Its `class_path` and `init_args`.
        error: The error from building or trying it.
        use: Builds and tries the class, given the class and its keyword arguments.
    """
    path = str(spec.get("class_path")) if isinstance(spec, Namespace) else None
    if path is None:
        return f"{key} cannot be used: {short_reason(error)}"
    arguments = vars(spec["init_args"]) if spec.get("init_args") else {}
    name = path.rpartition(".")[2]
    culprit = _culprit(path, arguments, use)
    if culprit is None:
        return f"{key} is {path}, which cannot be used: {short_reason(error)}"
    value = "null" if arguments[culprit] is None else str(arguments[culprit])[:80]
    return f"{key}.init_args.{culprit} is {value}, which {name} refuses: {short_reason(error)}"


def _culprit(path: str, arguments: dict[str, Any], use: Callable[..., object]) -> str | None:
    """Return the argument without which the class can be used; `None` if there is none."""
    module, _, name = path.rpartition(".")
    built = getattr(import_module(module), name, None)
    if any(isinstance(value, Namespace) for value in arguments.values()):
        return None  # nested classes, which only the parser can build
    for left_out in arguments:
        try:
            use(built, **{key: value for key, value in arguments.items() if key != left_out})
        except Exception:  # of any type: this argument is not the only cause
            continue
        return left_out
    return None
