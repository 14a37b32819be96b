"""The run that a command's settings describe: its configuration, its name and its folder."""

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from maml_pipeline import run_folder
from maml_pipeline.files import expand_home
from maml_pipeline.run_config import gradient_order
from maml_pipeline.run_folder import read_run_config
from maml_pipeline.runs.compatibility import Difference, config_differences
from maml_pipeline.tasks import TaskDistribution


@dataclass(frozen=True)
class RequestedRun:
    """The run that the settings of a command describe.

    Args:
        parser: The command's parser.
        values: The settings as plain values, without `run.dir` and `ckpt_path`.
        name: The name of its folder, `<experiment>-<order>-s<seed>`: all methods of an order share it.
        run_dir: The setting `run.dir`.
        config_of: The run whose `config.yaml` was given with `--config`.
        ckpt_path: `best`, `last`, a file, or `None`.
    """

    parser: ArgumentParser
    values: dict[str, Any]
    name: str
    run_dir: Path | None
    config_of: Path | None
    ckpt_path: str | None

    @classmethod
    def read(
        cls, parser: ArgumentParser, settings: Namespace, tasks: TaskDistribution
    ) -> "RequestedRun":
        """Read the run from the settings.

        Args:
            parser: The command's parser.
            settings: The parsed settings.
            tasks: The tasks, which name the run if `run.experiment` is `null`.

        Raises:
            UserError: A name or a path is invalid.
        """
        config_of, run_dir = _run_of_config(settings.config), settings.run.dir
        values = _plain(parser, settings)
        run, theirs = values["run"], {} if config_of is None else read_run_config(config_of)
        if theirs and run_dir is not None and (theirs.get("run") or {}).get("dir") == str(run_dir):
            run_dir = None  # an older version wrote it into the run's config
        if theirs and _is_name_of_other_tasks(values, _with_defaults(parser, theirs)):
            run["experiment"] = None
        if run["experiment"] is None:
            name = str(tasks.name)
            run_folder.check_name("the tasks' name", name)
            run["experiment"] = name
        order = gradient_order(values).degree
        return cls(
            parser,
            values,
            name=f"{run['experiment']}-{order}-s{values['seed_everything']}",
            run_dir=None if run_dir is None else expand_home(Path(str(run_dir)), "run.dir"),
            config_of=config_of,
            ckpt_path=settings.ckpt_path,
        )

    @property
    def named(self) -> Path | None:
        """The run folder that the user names, with `run.dir` or the run's config; `None` if neither."""
        return self.run_dir or self.config_of

    def differences(self, folder: Path) -> list[Difference]:
        """Return the settings in which the run in a folder differs.

        Raises:
            UserError: The folder's config cannot be read.
        """
        return config_differences(self.values, _with_defaults(self.parser, read_run_config(folder)))


def _run_of_config(configs: Sequence[Any] | None) -> Path | None:
    """Return the run folder of the last `--config` that is a run's `config.yaml`."""
    folders = [run_folder.enclosing_run(Path(str(config))) for config in configs or ()]
    return next((folder for folder in reversed(folders) if folder is not None), None)


def _is_name_of_other_tasks(values: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether `run.experiment` comes from a run's config that has other tasks than these."""
    here, there = ({"data": {"tasks": config["data"]["tasks"]}} for config in (values, theirs))
    return values["run"]["experiment"] == theirs["run"]["experiment"] and bool(
        config_differences(here, there)
    )


def _plain(parser: ArgumentParser, settings: Namespace) -> dict[str, Any]:
    settings = settings.clone()
    settings.ckpt_path, settings.run.dir = None, None
    values: dict[str, Any] = yaml.safe_load(parser.dump(settings, skip_unset=False))
    return values


def _with_defaults(parser: ArgumentParser, values: dict[str, Any]) -> dict[str, Any]:
    """Add defaults for keys that an older config lacks; return it unchanged if it has unknown keys."""
    try:
        with redirect_stderr(StringIO()):
            return _plain(parser, parser.parse_object(values))
    except (Exception, SystemExit):  # a class may have changed since, and raise anything
        return values
