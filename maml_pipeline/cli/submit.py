"""`maml submit`: submit a run or a trade-off to Slurm."""

import argparse
from collections.abc import Sequence

from maml_pipeline.cli.parser import Parser
from maml_pipeline.errors import UserError
from maml_pipeline.slurm.allocation import Allocation, check_sbatch_flags, required_allocation
from maml_pipeline.slurm.sbatch import (
    TRADEOFF_SCRIPT,
    TRAIN_SCRIPT,
    check_sbatch,
    cluster_gpus,
    print_dry_run,
    submit_job,
)
from maml_pipeline.text import counted


def run(arguments: Sequence[str]) -> None:
    """Check the settings and submit a job with the nodes and devices that they name.

    Args:
        arguments: The arguments after `maml submit`; those after `--` go to sbatch.

    Raises:
        UserError: A setting is invalid, or the job cannot be submitted.
    """
    own, sbatch_flags = _split(arguments)
    settings, own = _parse(own)
    from maml_pipeline.cli.terminal import configure_logging  # late: help needs no Lightning

    configure_logging()
    check_sbatch(needs_cluster=not settings.dry_run)
    check_sbatch_flags(sbatch_flags, settings.tradeoff)
    submit = _submit_tradeoff if settings.tradeoff else _submit_fit
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
    add("--dry_run", action="store_true", help="print the sbatch commands and the job script only")
    return parser.parse_known_args(arguments)


def _submit_fit(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    from maml_pipeline.cli.resolved_config import ResolvedConfig

    config = ResolvedConfig(arguments, elsewhere=True)
    requested = required_allocation(config.values["trainer"], *cluster_gpus())
    flags = [*requested.sbatch_flags, f"--job-name=maml-{config.run_name}", *sbatch_flags]
    command = [*flags, str(TRAIN_SCRIPT), *arguments, *requested.fit_flags]
    if dry_run:
        print_dry_run(TRAIN_SCRIPT, command)
        return
    job = submit_job(command)
    print(f"Submitted job {job}: {config.run_name} on {requested}")


def _submit_tradeoff(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    from maml_pipeline.cli.tradeoff import parse
    from maml_pipeline.cli.tradeoff_plan import Plan
    from maml_pipeline.run_folder import REPORT

    if taken := {"--cell", "--report"} & {argument.partition("=")[0] for argument in arguments}:
        raise UserError(f"{taken.pop()} is set by `maml submit` for each job; leave it out")
    trainer = Plan(*parse(arguments), elsewhere=True).shared["trainer"]
    requested = required_allocation(trainer, *cluster_gpus())
    arguments = [*arguments, *requested.fit_flags]
    # Again, with the devices that the jobs request, which the folder's config must hold.
    plan = Plan(*parse(arguments), elsewhere=True)
    cells = plan.tradeoff.cells
    missing = [i for i, cell in enumerate(cells) if not plan.tradeoff.is_finished(cell)]
    array = [
        *requested.sbatch_flags,
        f"--array={','.join(map(str, missing))}",
        f"--job-name=maml-{plan.experiment}-tradeoff",
        "--output=slurm-%A_%a.out",  # %A: the array, %a: the job's index in it
        *sbatch_flags,
        str(TRADEOFF_SCRIPT),
        *arguments,
    ]
    report = [
        *Allocation(nodes=1, devices=1, gpus="0").sbatch_flags,
        f"--job-name=maml-{plan.experiment}-report",
        *sbatch_flags,
        str(TRADEOFF_SCRIPT),
        *arguments,
    ]
    if dry_run:
        dependent = [_after("ARRAY"), *report] if missing else report
        print_dry_run(TRADEOFF_SCRIPT, *([array] if missing else []), dependent)
        return
    plan.tradeoff.create(plan.shared)
    if missing:
        job = submit_job(array)
        report = [_after(job), *report]
        print(
            f"Submitted array {job}: {counted(len(missing), 'cell')} of {plan.tradeoff.folder}, "
            f"each on {requested}"
        )
    try:
        report_job = submit_job(report)
    except UserError as error:
        raise UserError(
            "the report job was not submitted; write the report later with `maml tradeoff ... "
            f"--report`: {error}"
        ) from error
    print(f"Submitted job {report_job}: the report, {plan.tradeoff.folder / REPORT / 'report.html'}")


def _after(job: str) -> str:
    """Return sbatch's flag for a job that starts once another one has ended, successfully or not."""
    return f"--dependency=afterany:{job}"
