"""`maml submit --tradeoff`: an array with one job per cell, and a job that writes the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maml_pipeline.cli.submit_messages import print_submitted_array, print_submitted_report
from maml_pipeline.cli.tradeoff_arguments import parse
from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import record_slurm_job
from maml_pipeline.slurm.allocation import Allocation, required_allocation
from maml_pipeline.slurm.queue import Job, find_jobs, find_submitted
from maml_pipeline.slurm.sbatch import TRADEOFF_SCRIPT, cluster_gpus, print_dry_run, submit_job

if TYPE_CHECKING:
    from maml_pipeline.tradeoff.folder import Tradeoff


def check_arguments(arguments: Sequence[str]) -> None:
    """Check those arguments that can be checked before Lightning is imported.

    Raises:
        UserError: An argument is set by `maml submit`.
        SystemExit: An argument of the trade-off is invalid.
    """
    names = {argument.partition("=")[0] for argument in arguments}
    if taken := {"--cell", "--report", "--submitted"} & names:
        raise UserError(f"{taken.pop()} is set by `maml submit` for each job; leave it out")
    if "--parallel" in names:
        raise UserError("--parallel is not used by `maml submit`: each cell is a job; leave it out")
    parse(arguments)


def submit(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    """Submit the cells that are neither finished nor submitted already, and a report after them.

    Args:
        arguments: The arguments of `maml tradeoff`.
        sbatch_flags: Flags of sbatch.
        dry_run: Print the commands only.

    Raises:
        UserError: A setting is invalid, nothing is left to submit, or sbatch failed.
    """
    from maml_pipeline.cli.tradeoff_plan import Plan
    from maml_pipeline.tradeoff.submitted import reserved

    trainer = Plan(*parse(arguments), elsewhere=True).shared["trainer"]
    requested = required_allocation(trainer, *cluster_gpus())
    arguments = [*arguments, *requested.fit_flags]
    # Again, with the devices that the jobs request, which the folder's config must hold.
    plan = Plan(*parse(arguments), elsewhere=True)
    tradeoff = plan.tradeoff
    missing, active = _unfinished_cells(tradeoff)
    array = [
        *requested.sbatch_flags,
        f"--array={','.join(map(str, missing))}",
        f"--job-name=maml-{plan.experiment}-tradeoff",
        "--output=slurm-%A_%a.out",  # %A: the array, %a: the job's index in it
        *sbatch_flags,
        str(TRADEOFF_SCRIPT),
    ]
    report = [
        *Allocation(nodes=1, devices=1, gpus="0").sbatch_flags,
        f"--job-name=maml-{plan.experiment}-report",
        *sbatch_flags,
        str(TRADEOFF_SCRIPT),
    ]
    if dry_run:
        dependent = [_after(["ARRAY", *active]), *report] if missing else report
        listed = [array, dependent] if missing else [dependent]
        print_dry_run(TRADEOFF_SCRIPT, *([*command, *arguments] for command in listed))
        return
    if active and not missing:
        raise UserError(
            f"every unfinished cell of {tradeoff.folder} waits or runs already, in Slurm job "
            f"{', '.join(active)}; there is nothing to submit"
        )
    for note in plan.notes:
        print(note)
    with reserved(tradeoff, [tradeoff.cells[index] for index in missing], plan.shared) as cells:
        as_submitted = ["--submitted", str(cells)]
        new = [submit_job([*array, *as_submitted])] if missing else []
    # From here on the folders are the jobs'.
    for submitted in new:
        folders = {f"{submitted}_{i}": tradeoff.folder_of(tradeoff.cells[i]) for i in missing}
        jobs = _record_array(folders)
        print_submitted_array(jobs, folders, tradeoff.folder, requested)
    try:
        job = submit_job([*([_after([*new, *active])] if new else []), *report, *as_submitted])
    except UserError as error:
        raise UserError(
            "the report job was not submitted; write the report later with `maml tradeoff ... "
            f"--report`: {error}"
        ) from error
    print_submitted_report(find_submitted(job), new[0] if new else None, tradeoff.folder)


def _record_array(folders: Mapping[str, Path]) -> dict[str, Job]:
    """Record the element of an array that trains each cell, and return what Slurm knows about them."""
    for element, folder in folders.items():
        record_slurm_job(folder, element)
    jobs = find_jobs(folders)  # Slurm may take seconds to answer
    for element, job in jobs.items():
        record_slurm_job(folders[element], element, job.output)
    return jobs


def _unfinished_cells(tradeoff: "Tradeoff") -> tuple[list[int], list[str]]:
    """Return the indices of the cells to train, and the jobs that wait or run for other cells."""
    from maml_pipeline.runs.slurm_jobs import active_jobs

    missing = {
        i: tradeoff.folder_of(cell)
        for i, cell in enumerate(tradeoff.cells)
        if not tradeoff.is_finished(cell)
    }
    active = active_jobs([*missing.values()])
    arrays = {job.id.partition("_")[0]: None for job in active.values()}
    return [i for i, folder in missing.items() if folder not in active], [*arrays]


def _after(jobs: Sequence[str]) -> str:
    """Return sbatch's flag for a job that starts once others have ended, successfully or not."""
    return f"--dependency=afterany:{':'.join(jobs)}"
