"""`maml submit`: submit a run or a trade-off to Slurm."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from maml_pipeline.cli import submit_tradeoff
from maml_pipeline.cli.config_files import check_config_files, config_files, find_shipped
from maml_pipeline.cli.parser import Parser
from maml_pipeline.run_folder import CONFIG, record_slurm_job
from maml_pipeline.slurm.allocation import check_sbatch_flags, required_allocation
from maml_pipeline.slurm.queue import Job, find_submitted
from maml_pipeline.slurm.sbatch import (
    TRAIN_SCRIPT,
    check_sbatch,
    cluster_gpus,
    print_dry_run,
    submit_job,
)
from maml_pipeline.text import printable

if TYPE_CHECKING:
    from maml_pipeline.cli.resolved_config import ResolvedConfig


def run(arguments: Sequence[str]) -> None:
    """Check the settings and submit a job with the nodes and devices that they name.

    Args:
        arguments: The arguments after `maml submit`; those after `--` go to sbatch.

    Raises:
        UserError: A setting is invalid, or the job cannot be submitted.
    """
    own, sbatch_flags = _split(arguments)
    settings, own = _parse(own)
    # First what can be checked at once: importing Lightning takes seconds.
    check_sbatch(needs_cluster=not settings.dry_run)
    check_sbatch_flags(sbatch_flags, settings.tradeoff)
    check_config_files(find_shipped(own))
    if settings.tradeoff:
        submit_tradeoff.check_arguments(own)
    # Not on stdout, which has the result only.
    configs = ", ".join(printable(config) for config in config_files(own))
    print(f"Checking the settings of {configs or 'the run'} ...", file=sys.stderr, flush=True)
    from maml_pipeline.cli.terminal import configure_logging

    configure_logging()
    submit = submit_tradeoff.submit if settings.tradeoff else _submit_fit
    submit(own, sbatch_flags, settings.dry_run)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split at `--` into the arguments of this command and the flags of sbatch."""
    own = [*arguments]
    if "--" not in own:
        return own, []
    at = own.index("--")
    return own[:at], own[at + 1 :]


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="maml submit",
        usage="maml submit [--tradeoff] [--dry_run] --config FILE [--KEY VALUE ...] "
        "[-- --SBATCH_FLAG ...]",
        description="Submit a run to Slurm, or with --tradeoff an array of runs and a report job. The "
        "job asks for the nodes, tasks and GPUs of trainer.num_nodes, trainer.devices and "
        "trainer.accelerator.",
        examples=(
            "maml submit --dry_run --config sine --trainer.devices 1",
            "maml submit --config sine -- --partition gpu --time 2:00:00",
        ),
        epilog="Other keys are those of `maml fit`, or of `maml tradeoff` with --tradeoff. Flags of "
        "sbatch follow --; set those that never change in slurm/cluster.env.",
    )
    add = parser.add_argument
    add("--tradeoff", action="store_true", help="submit a trade-off: one job per cell, then a report")
    add("--dry_run", action="store_true", help="print the commands of sbatch and the job script only")
    return parser.parse_known_args(arguments)


def _submit_fit(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    from maml_pipeline.cli.resolved_config import ResolvedConfig
    from maml_pipeline.cli.submit_messages import print_submitted_run

    config = ResolvedConfig(arguments, elsewhere=True)
    requested = required_allocation(config.values["trainer"], *cluster_gpus())
    flags = [*requested.sbatch_flags, f"--job-name=maml-{config.run_name}", *sbatch_flags]
    if dry_run:
        print_dry_run(TRAIN_SCRIPT, [*flags, str(TRAIN_SCRIPT), *arguments, *requested.fit_flags])
        return
    command = [*flags, str(TRAIN_SCRIPT)]
    if config.target.resumes:
        folder, job = _submit_resumed(config, command, [*arguments, *requested.fit_flags])
    else:
        folder, job = _submit_new(config, command, requested.fit_flags)
    print_submitted_run(job, config.run_name, folder, requested)


def _submit_new(
    config: "ResolvedConfig", command: list[str], fit_flags: Sequence[str]
) -> tuple[Path, Job]:
    """Submit a new run, with the settings as they were checked."""
    from maml_pipeline.runs.submitted_folder import check_no_active_job, reserved_run_folder

    target = config.target
    if target.folder is not None:
        check_no_active_job(target.folder, "name another folder with --run.dir")
    text = yaml.safe_dump(config.values, sort_keys=False)
    start = [] if target.checkpoint is None else ["--ckpt_path", str(target.checkpoint)]
    with reserved_run_folder(target.folder, config.run_name, text) as folder:
        files = ["--config", str(folder / CONFIG), "--run.dir", str(folder)]
        job_id = submit_job([*command, *files, *start, *fit_flags])
    # From here on the folder is the job's. Slurm may take seconds to tell more about it.
    record_slurm_job(folder, job_id)
    job = find_submitted(job_id)
    record_slurm_job(folder, job_id, job.output)
    return folder, job


def _submit_resumed(
    config: "ResolvedConfig", command: list[str], arguments: list[str]
) -> tuple[Path, Job]:
    """Submit a run that resumes in its folder."""
    from maml_pipeline.runs.slurm_jobs import active_jobs
    from maml_pipeline.runs.submitted_folder import check_no_active_job

    folder = config.target.folder
    assert folder is not None
    waits = any(flag.startswith(("--dependency", "-d")) for flag in command)
    if not waits:
        check_no_active_job(folder, "resume after it: add -- --dependency=afterany:{job}")
    # Asked before the submission, which an unanswered question must not follow.
    keeps_record = waits and bool(active_jobs([folder]))
    job = find_submitted(submit_job([*command, *arguments, "--run.dir", str(folder)]))
    if not keeps_record:  # otherwise the job before this one still needs it
        record_slurm_job(folder, job.id, job.output)
    return folder, job
