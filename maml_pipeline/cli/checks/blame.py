"""Which argument of a class keeps it from being built: found by leaving out one after the other."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from jsonargparse import Namespace

LONGEST = 200


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def refusal(key: str, spec: Any, error: Exception, use: Callable[..., object]) -> str:
    """Say which setting a class of the configuration refuses, and why.

    Args:
        key: Of the class, such as `model.optimizer`.
        spec: Its `class_path` and `init_args`.
        error: What building it, or trying it, ended in.
        use: Builds and tries the class; it takes the class and its keyword arguments.
    """
    path = str(spec.get("class_path")) if isinstance(spec, Namespace) else None
    if path is None:
        return f"{key} cannot be used: {first_line(error)}"
    arguments = vars(spec["init_args"]) if spec.get("init_args") else {}
    name = path.rpartition(".")[2]
    culprit = _culprit(path, arguments, use)
    if culprit is None:
        return f"{key} is {path}, which cannot be used: {first_line(error)}"
    value = "null" if arguments[culprit] is None else str(arguments[culprit])[:80]
    return f"{key}.init_args.{culprit} is {value}, which {name} refuses: {first_line(error)}"


def _culprit(path: str, arguments: dict[str, Any], use: Callable[..., object]) -> str | None:
    """Return the argument without which the class can be used; `None` where there is no such one."""
    module, _, name = path.rpartition(".")
    built = getattr(import_module(module), name, None)
    if any(isinstance(value, Namespace) for value in arguments.values()):
        return None  # classes within the class, which only the parser can build
    for left_out in arguments:
        try:
            use(built, **{key: value for key, value in arguments.items() if key != left_out})
        except Exception:  # whatever a class raises: this argument is not the only one to blame
            continue
        return left_out
    return None
