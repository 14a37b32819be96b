"""Which run a command starts, resumes or measures, and from which checkpoint."""

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.files import expanded
from maml_pipeline.learner import slurm
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.runs import folder as run_folder
from maml_pipeline.runs.identity import (
    MEASUREMENT,
    Difference,
    differences,
    is_among,
    read_differences,
)

WHICH = ("best", "last")


@dataclass(frozen=True)
class Location:
    """Where a command works.

    Args:
        folder: The run's folder; `None` where a new run finds its own, or a measurement is kept nowhere.
        checkpoint: What to start from; `None` for the initial parameters.
        resumes: Whether `fit` continues the run in `folder`.
        differences: What tells a measurement from the official one of the run in `folder`.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    resumes: bool = False
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What the settings say about the place of a run.

    Args:
        name: The run's name.
        values: The resolved config.
        with_defaults: Fills the keys that an older config lacks.
        run_dir: `run.dir`.
        config_of: The run whose `config.yaml` was given with `--config`.
        ckpt_path: `best`, `last`, a file, or `None`.
    """

    name: str
    values: dict[str, Any]
    with_defaults: Callable[[dict[str, Any]], dict[str, Any]]
    run_dir: Path | None
    config_of: Path | None
    ckpt_path: str | None

    @property
    def named(self) -> Path | None:
        """The folder that the user names, in the one way or the other."""
        return self.run_dir or self.config_of

    def differences(self, folder: Path) -> list[Difference]:
        """Return the keys in which the run in a folder has other settings."""
        return differences(self.values, self.with_defaults(read_config(folder)))


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's config.

    Raises:
        UserError: It cannot be read.
    """
    file = folder / run_folder.CONFIG
    if not file.exists():
        raise UserError(f"{folder} has no {file.name}, which would say what run it holds; name another")
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not the config of a run")
    return config


def config_of_run(configs: Sequence[Any] | None) -> Path | None:
    """Return the run folder of the last `--config` that is a run's `config.yaml`."""
    folders = [run_folder.run_of(Path(str(config))) for config in configs or ()]
    return next((folder for folder in reversed(folders) if folder is not None), None)


def explicit_folder(run_dir: Any, config_of: Path | None) -> Path | None:
    """Return `run.dir`, unless it is what an older version wrote into a run's own config."""
    if run_dir is None:
        return None
    if config_of is not None and (read_config(config_of).get("run") or {}).get("dir") == str(run_dir):
        return None
    return expanded(Path(str(run_dir)), "run.dir")


def carried_name(values: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Return `run.experiment`, unless it is what a run's own config calls other tasks than these.

    Args:
        values: The resolved config.
        theirs: That of the run whose `config.yaml` was given with `--config`.
    """
    name: str | None = values["run"]["experiment"]
    is_theirs = name == theirs["run"]["experiment"]
    here, there = ({"data": {"tasks": config["data"]["tasks"]}} for config in (values, theirs))
    return None if is_theirs and differences(here, there) else name


def resume_command(folder: Path | None) -> str | None:
    """Return the command that resumes a run, as it can be typed in this working directory.

    Returns:
        `None` where nothing of the run is saved.
    """
    if folder is None or not run_folder.checkpoint(folder, "last").exists():
        return None
    config = folder / run_folder.CONFIG
    return shlex.join(["maml", "fit", "--config", str(config), "--ckpt_path", "last"])


def locate_training(request: Request) -> Location:
    """Find out whether `fit` starts a run or resumes one, and which.

    `last` and `best` resume a run with these very settings. A file starts a new run from the state in
    it, unless it lies in the folder that `run.dir` names: that is resuming as well.

    Raises:
        UserError: There is no such run, or it has other settings.
    """
    wanted = request.ckpt_path
    if wanted in WHICH:
        folder = _named_run(request, wanted) if request.named else _matching_run(request, wanted)
        file = run_folder.checkpoint(folder, wanted)
        _check_not_past(request, file)
        return Location(folder, file, resumes=True)
    if wanted is not None:
        file = _existing_file(wanted)
        run_dir = request.run_dir
        if run_dir is not None and _same(file.parent, run_dir / run_folder.CHECKPOINTS):
            _check_same_run(request, run_dir)
            _check_not_past(request, file)
            return Location(run_dir, file, resumes=True)
        return Location(_new(request), file)
    requeued = _run_of_own_job(request)
    if requeued is not None:
        last = run_folder.checkpoint(requeued, "last")
        return Location(requeued, last if last.exists() else None, resumes=True)
    return Location(_new(request))


def locate_measurement(request: Request, official: str) -> Location:
    """Find out which checkpoint is measured, and how that differs from its run's own measurement.

    Args:
        request: What the settings say.
        official: Name of the file that holds the run's own result.

    Raises:
        UserError: There is no such checkpoint.
    """
    wanted, folder = request.ckpt_path, request.named
    if wanted is None and folder is None:
        return Location()  # the initial parameters, for which there is no folder
    if wanted is not None and wanted not in WHICH:
        file = _existing_file(wanted)
        owner = run_folder.run_of(file)
        if folder is not None and (owner is None or not _same(owner, folder)):
            if request.run_dir is not None:
                raise UserError(f"ckpt_path {file} is not a checkpoint of the run in run.dir {folder}")
            owner = None
        elif owner is not None and folder is None and not _measures(request, owner):
            owner = None
        if owner is None:
            return Location(checkpoint=file)  # with settings that are not its run's: kept nowhere
        folder = owner
    elif folder is None:
        assert wanted is not None
        folder = _matching_run(request, wanted, MEASUREMENT)
        file = run_folder.checkpoint(folder, wanted)
    else:
        file = run_folder.checkpoint(folder, wanted) if wanted else run_folder.result_checkpoint(folder)
        if not file.exists():
            raise UserError(f"{folder} has no {file.name} to measure; give ckpt_path or another folder")
    found = request.differences(folder) + _other_state(folder, file, official)
    return Location(folder, file, differences=found)


def _other_state(folder: Path, file: Path, official: str) -> list[Difference]:
    own = run_folder.result_checkpoint(folder)
    if not _same(file, own):
        return [Difference("ckpt_path", file.name, own.name)]
    if (folder / official).exists():
        return []
    last, end = run_folder.checkpoint(folder, "last"), read_config(folder)["trainer"]["max_steps"]
    trained = load_checkpoint(str(last))["global_step"] if last.exists() else 0
    return [] if trained == end else [Difference("trainer.max_steps", trained, end)]


def _measures(request: Request, folder: Path) -> bool:
    return all(is_among(difference.key, MEASUREMENT) for difference in request.differences(folder))


def _named_run(request: Request, which: str) -> Path:
    folder = request.named
    assert folder is not None
    _check_has(folder, which)
    _check_same_run(request, folder)
    return folder


def _matching_run(request: Request, which: str, ignored: Collection[str] = ()) -> Path:
    """Return the newest run of this name that has the checkpoint and these settings.

    Of runs that differ by `ignored` keys alone, it is the one with the fewest differences.
    """
    found = [f for f in run_folder.existing(request.name) if run_folder.checkpoint(f, which).exists()]
    if not found:
        _check_has(run_folder.RUNS / request.name, which)
    compared = {folder: request.differences(folder) for folder in reversed(found)}
    closest = min(compared, key=lambda folder: len(compared[folder]))  # of equals the newest
    if decisive := [d for d in compared[closest] if not is_among(d.key, ignored)]:
        raise UserError(
            f"ckpt_path is {which}, but no run called {request.name} has these settings: "
            f"{read_differences(closest, decisive)}; set the same, or name a run with --run.dir"
        )
    return closest


def _check_has(folder: Path, which: str) -> None:
    file = run_folder.checkpoint(folder, which)
    if not file.exists():
        raise UserError(f"ckpt_path is {which}, but there is no {file}; name the run with --run.dir")


def _check_same_run(request: Request, folder: Path) -> None:
    if found := request.differences(folder):
        raise UserError(
            f"{read_differences(folder, found)}; set the same to resume it, or leave out ckpt_path and "
            "run.dir to start a run of its own"
        )


def _check_not_past(request: Request, file: Path) -> None:
    trained, end = load_checkpoint(str(file))["global_step"], request.values["trainer"]["max_steps"]
    if 0 <= end < trained:
        raise UserError(
            f"trainer.max_steps is {end}, but {file} is at meta-step {trained}; set at least as many"
        )


def _new(request: Request) -> Path | None:
    """Return the folder that a new run was told to take, where it was, and it can.

    A folder with settings but no checkpoint is that of a run that was killed before it had saved
    anything: the same run starts in it anew.
    """
    folder = request.run_dir
    if folder is None:
        return None
    check_free(folder)
    if (folder / run_folder.CONFIG).exists() and (found := request.differences(folder)):
        raise UserError(f"run.dir {read_differences(folder, found)}; name another folder")
    return folder


def check_free(folder: Path) -> None:
    """Refuse a folder that holds the state of a run.

    Raises:
        UserError: It does.
    """
    if run_folder.checkpoint(folder, "last").exists():
        raise UserError(
            f"run.dir {folder} already holds a run; "
            "add --ckpt_path last to resume it, or name another folder"
        )


def _run_of_own_job(request: Request) -> Path | None:
    """Return the run that this Slurm job began before it was requeued.

    A job never continues another one's run, and of its own runs only the one with these settings. Of
    several, from a time when Slurm had counted to the same number, the newest is meant.
    """
    job = slurm.job_id()
    if job is None or not slurm.is_restart():
        return None
    folders = [request.run_dir] if request.run_dir else run_folder.existing(request.name)
    for folder in reversed(folders):
        is_own = run_folder.job_of(folder) == job and (folder / run_folder.CONFIG).exists()
        if is_own and not request.differences(folder):
            return folder
    return None


def _existing_file(path: str) -> Path:
    file = expanded(Path(path), "ckpt_path")
    if not file.is_file():
        raise UserError(f"ckpt_path {path} does not exist; give best, last or a file's path")
    return file


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
