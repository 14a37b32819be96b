"""Find the checkpoint that `maml test` and `maml validate` evaluate, and where its result belongs."""

import contextlib
from pathlib import Path

from maml_pipeline import run_folder
from maml_pipeline.cli.requested_run import RequestedRun
from maml_pipeline.cli.start_or_resume import WHICH, RunTarget, existing_file, is_same, matching_run
from maml_pipeline.errors import UserError
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.run_folder import read_run_config
from maml_pipeline.runs.compatibility import MAY_CHANGE_ON_EVALUATION, Difference, is_listed


def find_evaluation_target(request: RequestedRun, official: str) -> RunTarget:
    """Find the checkpoint to evaluate, and how this evaluation differs from the one of `maml fit`.

    Args:
        request: The run that the settings name.
        official: Name of the file with the run's own result.

    Raises:
        UserError: There is no such checkpoint.
    """
    wanted, folder = request.ckpt_path, request.named
    if wanted is None and folder is None:
        return RunTarget()  # the initial parameters, which have no folder
    if wanted is not None and wanted not in WHICH:
        file = existing_file(wanted)
        owner = run_folder.enclosing_run(file)
        if folder is not None and (owner is None or not is_same(owner, folder)):
            if request.run_dir is not None:
                raise UserError(f"ckpt_path {file} is not a checkpoint of the run in run.dir {folder}")
            owner = None
        elif owner is not None and folder is None and not _measures(request, owner):
            owner = None
        if owner is None:
            return RunTarget(
                checkpoint=file
            )  # with other settings than its run: the result is not saved
        folder = owner
    elif folder is None:
        assert wanted is not None
        folder = matching_run(request, wanted, MAY_CHANGE_ON_EVALUATION)
        file = run_folder.checkpoint_path(folder, wanted)
    else:
        file = (
            run_folder.checkpoint_path(folder, wanted)
            if wanted
            else run_folder.checkpoint_to_test(folder)
        )
        if not file.exists():
            raise UserError(
                f"{folder} has no {file.name} to evaluate; set ckpt_path, or name another folder"
            )
    found = request.differences(folder) + _other_state(folder, file, official)
    return RunTarget(folder, file, differences=found)


def newest_trained_run(request: RequestedRun) -> Path | None:
    """Return the newest run with the requested name and training settings; `None` if there is none."""
    folders = run_folder.folders_named(request.name)
    for folder in reversed([f for f in folders if run_folder.checkpoint_to_test(f).exists()]):
        with contextlib.suppress(UserError):  # its config cannot be read
            if _measures(request, folder):
                return folder
    return None


def _other_state(folder: Path, file: Path, official: str) -> list[Difference]:
    own = run_folder.checkpoint_to_test(folder)
    if not is_same(file, own):
        return [Difference("ckpt_path", file.name, own.name)]
    # A test ends a training, also one that ended before its last meta-step, such as by `max_time`.
    if (folder / official).exists() or (folder / run_folder.TEST).exists():
        return []
    last = run_folder.checkpoint_path(folder, "last")
    end = read_run_config(folder)["trainer"]["max_steps"]
    trained = load_checkpoint(str(last))["global_step"] if last.exists() else 0
    return [] if trained == end else [Difference("trained meta-steps", trained, end)]


def _measures(request: RequestedRun, folder: Path) -> bool:
    return all(
        is_listed(difference.key, MAY_CHANGE_ON_EVALUATION) for difference in request.differences(folder)
    )
