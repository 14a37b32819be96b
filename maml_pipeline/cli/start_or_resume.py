"""Find the run that `maml fit` starts or resumes, and the checkpoint to start from."""

import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from maml_pipeline import run_folder, slurm
from maml_pipeline.cli.requested_run import RequestedRun
from maml_pipeline.environment import WANDB_RUN_ID, WANDB_SWEEP_ID
from maml_pipeline.errors import UserError
from maml_pipeline.files import expand_home
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.learner.tracking.run_id import read_wandb_id
from maml_pipeline.runs.compatibility import (
    Difference,
    describe_differences,
    is_listed,
)

WHICH = ("best", "last")

RESTORED = ("model.optimizer", "model.lr_scheduler", "model.learned_inner_lr")
"""Keys whose values PyTorch restores from a checkpoint, with the state of optimizer and schedule."""


@dataclass(frozen=True)
class RunTarget:
    """The run of a command.

    Args:
        folder: The run's folder; `None` for a new run without `run.dir`, or a result that is not saved.
        checkpoint: The checkpoint to start from; `None` for the initial parameters.
        resumes: Whether `fit` resumes the run in `folder`.
        differences: How an evaluation differs from the run's own.
    """

    folder: Path | None = None
    checkpoint: Path | None = None
    resumes: bool = False
    differences: list[Difference] = field(default_factory=list)


def resume_command(folder: Path | None) -> str | None:
    """Return the command that resumes a run, to type in the working directory.

    Returns:
        `None` if the run has no checkpoint.
    """
    if folder is None or not run_folder.checkpoint_path(folder, "last").exists():
        return None
    config = folder / run_folder.CONFIG
    return shlex.join(["maml", "fit", "--config", str(config), "--ckpt_path", "last"])


def find_training_target(request: RequestedRun) -> RunTarget:
    """Find out whether `fit` starts or resumes a run, and which.

    `last` and `best` resume a run with the same settings. A checkpoint file starts a new run, unless it
    lies in the folder `run.dir`, which is then resumed. A requeued job resumes its own run, and so does
    a trial of a W&B sweep that was preempted.

    Raises:
        UserError: The run does not exist, has other settings, or is past the end of training.
    """
    requeued = _run_of_own_job(request) or _run_of_own_trial(request)
    if requeued is not None and (last := run_folder.checkpoint_path(requeued, "last")).exists():
        return RunTarget(requeued, last, resumes=True)
    wanted = request.ckpt_path
    if wanted in WHICH:
        folder = _named_run(request, wanted) if request.named else matching_run(request, wanted)
        file = run_folder.checkpoint_path(folder, wanted)
        _check_not_past(request, file)
        return RunTarget(folder, file, resumes=True)
    if wanted is not None:
        file = existing_file(wanted)
        run_dir = request.run_dir
        if run_dir is not None and is_same(file.parent, run_dir / run_folder.CHECKPOINTS):
            _check_same_run(request, run_dir)
            _check_not_past(request, file)
            return RunTarget(run_dir, file, resumes=True)
        _check_goes_on(request, file)
        _check_same_optimizer(request, file)
        return RunTarget(_new(request) if requeued is None else requeued, file)
    if requeued is not None:
        return RunTarget(requeued, resumes=True)
    return RunTarget(_new(request))


def _named_run(request: RequestedRun, which: str) -> Path:
    folder = request.named
    assert folder is not None
    _check_has(folder, which)
    _check_same_run(request, folder)
    return folder


def matching_run(request: RequestedRun, which: str, ignored: Collection[str] = ()) -> Path:
    """Return the newest run with the requested name, settings and checkpoint.

    Among runs that differ only in `ignored` keys, the one with the fewest differences is returned.
    """
    found = [
        f
        for f in run_folder.folders_named(request.name)
        if run_folder.checkpoint_path(f, which).exists()
    ]
    if not found:
        _check_has(run_folder.RUNS / request.name, which)
    compared = _compared(request, reversed(found))
    closest = min(compared, key=lambda folder: len(compared[folder]))  # the newest of equals
    if decisive := [d for d in compared[closest] if not is_listed(d.key, ignored)]:
        raise UserError(
            f"ckpt_path is {which}, but no run called {request.name} has these settings: "
            f"{describe_differences(closest, decisive)}; use the same settings, or name a run with "
            "--run.dir"
        )
    return closest


def _compared(request: RequestedRun, folders: Iterable[Path]) -> dict[Path, list[Difference]]:
    """Return the differences to each run, without unreadable ones unless all are unreadable."""
    compared, unreadable = {}, None
    for folder in folders:
        try:
            compared[folder] = request.differences(folder)
        except UserError as error:
            unreadable = error
    if unreadable is not None and not compared:
        raise unreadable
    return compared


def _check_has(folder: Path, which: str) -> None:
    file = run_folder.checkpoint_path(folder, which)
    if not file.exists():
        raise UserError(f"ckpt_path is {which}, but there is no {file}; name the run with --run.dir")


def _check_same_run(request: RequestedRun, folder: Path) -> None:
    if found := request.differences(folder):
        raise UserError(
            f"{describe_differences(folder, found)}; use the same settings to resume it, or leave "
            "out ckpt_path and run.dir to start a new run"
        )


def _check_not_past(request: RequestedRun, file: Path) -> None:
    trained, end = _meta_steps(request, file)
    if 0 <= end < trained:
        raise UserError(
            f"trainer.max_steps is {end}, but {file} is at meta-step {trained}; set at least {trained}"
        )


def _check_goes_on(request: RequestedRun, file: Path) -> None:
    """Refuse a new run that would train nothing: its result would be that of the other run's state."""
    trained, end = _meta_steps(request, file)
    if 0 <= end <= trained:
        raise UserError(
            f"trainer.max_steps is {end}, but {file} is at meta-step {trained}, from which the new run "
            f"goes on counting; set more than {trained}"
        )


def _check_same_optimizer(request: RequestedRun, file: Path) -> None:
    """Refuse a new run whose config would show other settings of the optimizer than it trains with."""
    owner = run_folder.enclosing_run(file)
    found = [] if owner is None else request.differences(owner)
    for key, here, there in found:
        if is_listed(key, RESTORED):
            raise UserError(
                f"{key} is {here} here and {there} in {owner}, whose optimizer the new run goes on "
                "with; use the same value, or leave out ckpt_path"
            )


def _meta_steps(request: RequestedRun, file: Path) -> tuple[int, int]:
    """Return the meta-step of a checkpoint, and that at which training ends: -1 for no end."""
    return load_checkpoint(str(file))["global_step"], request.values["trainer"]["max_steps"]


def _new(request: RequestedRun) -> Path | None:
    """Return the folder `run.dir` for a new run, after checking that it is free; `None` if unset.

    A folder with a config but no checkpoint is from a run that was killed before its first checkpoint:
    the same run can start in it again. Or it was created for this Slurm job when it was submitted.
    """
    folder = request.run_dir
    if folder is None:
        return None
    check_free(folder)
    file = folder / run_folder.CONFIG
    if file.exists() and not run_folder.is_run_folder(folder):
        raise UserError(
            f"run.dir: {file} does not belong to a run and would be overwritten; name another folder"
        )
    if not file.exists() and (foreign := run_folder.files_of_a_run(folder)):
        raise UserError(
            f"run.dir {folder} is not a run's folder, but has {foreign[0]}, which a run would replace "
            "or remove; name another folder"
        )
    is_reserved = slurm.job_id() is not None and run_folder.read_slurm_job(folder) == slurm.job_id()
    if file.exists() and not is_reserved and (found := request.differences(folder)):
        raise UserError(f"run.dir {describe_differences(folder, found)}; name another folder")
    return folder


def check_free(folder: Path) -> None:
    """Refuse a folder that already has a checkpoint.

    Raises:
        UserError: It has one.
    """
    if run_folder.checkpoint_path(folder, "last").exists():
        raise UserError(
            f"run.dir {folder} already holds a run; "
            "add --ckpt_path last to resume it, or name another folder"
        )


def _run_of_own_job(request: RequestedRun) -> Path | None:
    """Return the run that this Slurm job started before it was requeued.

    A job resumes only a run that it started itself, with the same settings. If several runs have its
    job id, because Slurm has reused it, the newest is taken.
    """
    job = slurm.job_id()
    if job is None or not slurm.is_restart():
        return None
    folders = [request.run_dir] if request.run_dir else run_folder.folders_named(request.name)
    for folder in reversed(folders):
        is_own = run_folder.read_slurm_job(folder) == job and (folder / run_folder.CONFIG).exists()
        if is_own and not request.differences(folder):
            return folder
    return None


def _run_of_own_trial(request: RequestedRun) -> Path | None:
    """Return the run of a trial that was preempted, and that W&B hands out again under the same id."""
    trial = WANDB_RUN_ID.get()
    if trial is None or not WANDB_SWEEP_ID.is_set():
        return None
    folders = [request.run_dir] if request.run_dir else run_folder.folders_named(request.name)
    for folder in folders:
        is_own = read_wandb_id(folder / run_folder.WANDB_ID) == trial
        if is_own and (folder / run_folder.CONFIG).exists() and not request.differences(folder):
            return folder
    return None


def existing_file(path: str) -> Path:
    """Return the checkpoint file that `ckpt_path` names.

    Raises:
        UserError: It does not exist.
    """
    file = expand_home(Path(path), "ckpt_path")
    if not file.is_file():
        raise UserError(f"ckpt_path {path} does not exist; give best, last or a file's path")
    return file


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths name the same file or folder."""
    return one.resolve() == other.resolve()
