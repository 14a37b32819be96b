"""What to type instead of an unknown key: `--shots 5` is `--data.tasks.shots 5`."""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maml_pipeline.cli.config_files import config_files
from maml_pipeline.cli.training_help import GROUPS
from maml_pipeline.config_file import REMOVED_KEYS, RENAMED_KEYS, read_config
from maml_pipeline.run_folder import CONFIG
from maml_pipeline.shipped_files import shipped_configs

ALIASES = {
    **dict.fromkeys(("seed", "random_seed"), "seed_everything"),
    **dict.fromkeys(("way", "n_way", "n_ways", "num_ways"), "ways"),
    **dict.fromkeys(("shot", "k_shot", "k_shots", "n_shot", "n_shots", "num_shots"), "shots"),
    **dict.fromkeys(("query", "queries", "num_query", "k_query"), "query_shots"),
    **dict.fromkeys(("task", "dataset", "data_set"), "data.tasks"),
    **dict.fromkeys(("batch_size", "tasks_per_batch", "num_tasks"), "meta_batch_size"),
    **dict.fromkeys(("workers", "n_workers"), "num_workers"),
    **dict.fromkeys(("learning_rate", "outer_lr", "meta_lr", "beta"), "lr"),
    **dict.fromkeys(("inner_learning_rate", "alpha", "fast_lr", "adapt_lr", "update_lr"), "inner_lr"),
    **dict.fromkeys(("adaptation_steps", "adapt_steps", "num_inner_steps", "k"), "inner_steps"),
    **dict.fromkeys(("eval_steps", "test_steps", "test_inner_steps"), "eval_inner_steps"),
    **dict.fromkeys(("epochs", "num_epochs", "iterations", "num_steps", "meta_steps"), "max_steps"),
    **dict.fromkeys(("gpus", "gpu", "num_gpus", "num_devices"), "devices"),
    **dict.fromkeys(("nodes", "n_nodes"), "num_nodes"),
    **dict.fromkeys(("val_interval", "val_every", "eval_every"), "val_check_interval"),
    **dict.fromkeys(("checkpoint", "ckpt", "restore", "load"), "ckpt_path"),
    **dict.fromkeys(("out", "output", "out_dir", "output_dir", "log_dir", "save_dir"), "run.dir"),
    **dict.fromkeys(("name", "run_name", "exp_name"), "run.experiment"),
}
"""Other names of a key, and the key or its last part."""

SETTINGS = {
    "resume": "--ckpt_path last",
    "cpu": "--trainer.accelerator cpu",
    "fomaml": "--model.first_order true",
    "first_order": "--model.first_order true",
    "second_order": "--model.first_order false",
    "amp": "--trainer.precision bf16-mixed",
    "bf16": "--trainer.precision bf16-mixed",
}
"""Flags that other programs take without a value, and the same as a key with one."""

ALTERNATIVES = {"steps": ("model.inner_steps", "trainer.max_steps")}
TASK_ARGUMENTS = ("ways", "shots", "query_shots")

CLASSES = {
    "data.tasks": ("maml_pipeline.tasks",),
    **{
        f"data.tasks.{key}": ("torchvision.datasets",)
        for key in ("dataset", "train_dataset", "val_dataset", "test_dataset")
    },
    "model.network": ("maml_pipeline.networks", "torch.nn"),
    "model.optimizer": ("torch.optim",),
    "model.lr_scheduler": ("torch.optim.lr_scheduler",),
}
"""Keys that take a class, and the modules whose classes can be named without a path."""

BASE_CLASSES = ("TaskDistribution", "VisionDataset", "Optimizer", "LRScheduler", "Module")
"""Names of the classes that those of a key are derived from."""

SWITCHES = {
    key.name
    for keys in GROUPS.values()
    for key in keys
    if key.default.rpartition(" ")[2] in ("true", "false")
}
"""Keys that are true or false."""

DEFAULT_OPTIMIZER = "torch.optim.Adam"

_MISSING_KEYS = re.compile(r"the following arguments are required: (.*)")
_MISSING_VALUE = re.compile(r"--([\w.]+): expected one argument")
_UNKNOWN_CLASS = re.compile(
    r"([\w.]+)(?: is ([\w.]+); it must be the import path of a |: module '\S+' has no attribute '(\w+)')"
)
_UNKNOWN_MODULE = re.compile(r"No module named '(\w+)")
_UNKNOWN_FLAGS = re.compile(r"[Uu]nrecognized arguments: (.*)")
_NOT_ACCEPTED = re.compile(r"(?:Subcommand|Group) '[\w.]+' does not accept option '([\w.]+)'")
_UNKNOWN_KEY = re.compile(r"there is no key ([\w.]+)")
_UNKNOWN_ARGUMENT = re.compile(r"([\w.]+): Option '([\w.]+)' is not accepted")


def describe_missing(message: str, arguments: Sequence[str]) -> str:
    """Rewrite a message about missing or unknown keys, or a missing value; return others unchanged.

    Args:
        message: The error message.
        arguments: The arguments of the command.
    """
    if found := _MISSING_KEYS.fullmatch(message):
        if not any(config_files(arguments)):
            return "no config is given; add one, such as --config toy"
        keys = re.sub(r"\b(fit|validate|test)\.", "", found[1])
        return f"no value for {keys}; set it in a config or on the command line"
    if (found := _MISSING_VALUE.fullmatch(message)) and found[1] in SWITCHES:
        return f"{message}: true or false"
    if found := _NOT_ACCEPTED.fullmatch(message):
        return unknown_key(found[1])
    return message


def unknown_key(key: str) -> str:
    """Return the message about an unknown key in a configuration file, to which `suggest` may append."""
    return f"there is no key {key}"


def suggest(message: str, keys: Sequence[str], arguments: Sequence[str]) -> str:
    """Return what to append to an error message about an unknown key or class, or an empty text.

    Args:
        message: The error message.
        keys: Every key of the parser.
        arguments: The arguments of the command. The classes that they and their configuration files
            name decide which further keys there are.
    """
    if removed := [key for key in REMOVED_KEYS if re.search(rf"\b{re.escape(key)}\b", message)]:
        return f"; {removed[0]} is {REMOVED_KEYS[removed[0]]}, leave it out"
    for key, (present, values) in RENAMED_KEYS.items():
        if re.search(rf"\b{re.escape(key)}\b", message):
            meant = " or ".join(values.values())
            return f"; {key} is {present} now" + (f", with the value {meant}" if meant else "")
    if (found := _UNKNOWN_MODULE.search(message)) and find_spec(found[1]) is None:
        return f"; put the folder of {found[1]} on PYTHONPATH"
    if found := _UNKNOWN_CLASS.match(message):
        close = _closest_classes(found[1], found[2] or found[3])
        return f"; did you mean {' or '.join(close)}?" if close else ""
    classes = _named_classes(arguments)
    if found := _UNKNOWN_ARGUMENT.search(message):
        return _class_arguments(found[1], found[2], classes)
    known = list(dict.fromkeys([*keys, *_class_keys(classes)]))
    if found := _UNKNOWN_KEY.search(message):
        close = _closest(found[1], known)
        return f"; did you mean {' or '.join(close)}?" if close else ""
    if not (found := _UNKNOWN_FLAGS.search(message)):
        return ""
    unknown = [*_unknown_flags(found[1])]
    flags = [f"--config {file}" for file in _bare_config_files(found[1])]
    flags += [flag for name, value in unknown if (flag := _flags_for(name, value, known, classes))]
    if flags:
        return f"; did you mean {', '.join(flags)}?"
    last = unknown[0][0].rpartition(".")[2] if unknown else ""
    return _class_arguments("data.tasks", last, classes) if last in TASK_ARGUMENTS else ""


def _unknown_flags(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield each flag in the parser's list of unknown arguments, with its value if it has one."""
    words = text.split()
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            follows = None if following.startswith("--") else following
            yield name.replace("-", "_"), value if equals else follows


def _bare_config_files(text: str) -> Iterator[str]:
    """Yield each config in the parser's list of unknown arguments, or that of a run's folder.

    Values of flags are left out.
    """
    words, shipped = text.split(), shipped_configs()
    for before, word in zip(["", *words], words, strict=False):
        is_value = before.startswith("--") and "=" not in before
        is_config = word in shipped or word.endswith((".yaml", ".yml"))
        if not word.startswith("-") and not is_value:
            if is_config:
                yield word
            elif (Path(word) / CONFIG).is_file():
                yield str(Path(word) / CONFIG)


def _flags_for(name: str, value: str | None, keys: list[str], classes: dict[str, str]) -> str:
    """Return the flags that do what an unknown flag was meant to do; empty if none is known."""
    last = name.rpartition(".")[2].lower()
    if value is None and last in SETTINGS:
        return SETTINGS[last]
    if last == "order" and f"{value}_order" in SETTINGS:
        return SETTINGS[f"{value}_order"]
    value_text = "" if value is None else f" {value}"
    if alternatives := ALTERNATIVES.get(last):
        return " or ".join(f"--{key}{value_text}" for key in alternatives)
    wanted = ALIASES.get(last, last)
    found = [key for key in keys if key == wanted or key.endswith(f".{wanted}")]
    if wanted == "ways" and len(found) > 1:  # the network needs as many outputs
        return " ".join(f"--{key}{value_text}" for key in found)
    if not found and wanted == "lr" and "model.optimizer" not in classes:
        return f"--model.optimizer {DEFAULT_OPTIMIZER} --model.optimizer.lr{value_text}"
    if not found and wanted in TASK_ARGUMENTS and "data.tasks" not in classes:
        return f"--config FILE --data.tasks.{wanted}{value_text}"
    return " or ".join(f"--{key}{value_text}" for key in found[:3] or _closest(name, keys))


def _closest(name: str, keys: Sequence[str]) -> list[str]:
    """Return up to three keys that are spelled like a name, in their last part or as a whole."""
    last_parts = {key.rpartition(".")[2]: key for key in keys}
    last = difflib.get_close_matches(name.rpartition(".")[2], last_parts, n=1, cutoff=0.7)
    close = [last_parts[part] for part in last]
    if "." in name:
        close += difflib.get_close_matches(name, keys, n=2)
    return list(dict.fromkeys(close))[:3]


def _closest_classes(key: str, path: str) -> list[str]:
    """Return up to three import paths of classes that a key takes and that are spelled like `path`."""
    name = path.rpartition(".")[2].lower()
    for module in CLASSES.get(key, ()):
        members = inspect.getmembers(import_module(module), inspect.isclass)
        bases = [member for member_name, member in members if member_name in BASE_CLASSES]
        paths = {
            member_name.lower(): f"{module}.{member_name}"
            for member_name, member in members
            if member not in bases and (not bases or issubclass(member, tuple(bases)))
        }
        longer = [one for one in paths if one.startswith(name)]
        if close := longer[:3] or difflib.get_close_matches(name, paths):
            return [paths[one] for one in close]
    return []


def _class_arguments(key: str, name: str, classes: dict[str, str]) -> str:
    """Return which arguments the class of a key takes, or the one that is spelled like `name`."""
    taken = _parameters(key, classes[key]) if key in classes else []
    if close := difflib.get_close_matches(ALIASES.get(name, name), taken, n=1):
        return f"; did you mean {close[0]}?"
    class_name = classes.get(key, "").rpartition(".")[2]
    return f"; {class_name} takes {', '.join(taken)}" if taken else ""


def _class_keys(classes: dict[str, str]) -> Iterator[str]:
    for key, path in classes.items():
        yield from (f"{key}.{name}" for name in _parameters(key, path))


def _parameters(key: str, path: str) -> list[str]:
    """Return the named arguments of a class, without those that the program passes."""
    module, _, name = path.rpartition(".")
    for candidate in [module] if module else CLASSES[key]:
        try:
            signature = inspect.signature(getattr(import_module(candidate), name))
        except (ImportError, AttributeError, TypeError, ValueError):
            continue
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = [p.name for p in signature.parameters.values() if p.kind in named]
        return [name for name in found if name not in ("params", "optimizer")]
    return []


def _named_classes(arguments: Sequence[str]) -> dict[str, str]:
    """Return the class path of each key in `CLASSES` that the configuration names."""
    configs: list[Any] = [
        read_config(Path(file), "config") for file in config_files(arguments) if Path(file).is_file()
    ]
    classes: dict[str, str] = {}
    for config in configs:
        for key in CLASSES:
            value = config
            for part in key.split("."):
                value = value.get("init_args", value) if isinstance(value, dict) else None
                value = value.get(part) if isinstance(value, dict) else None
            value = value.get("class_path") if isinstance(value, dict) else value
            if isinstance(value, str):
                classes[key] = value
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag.removeprefix("--") in CLASSES:
            classes[flag.removeprefix("--")] = value if equals else following
    return classes
