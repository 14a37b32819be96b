"""`maml submit`: a training or a trade-off put into the queue of a Slurm cluster."""

import argparse
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maml_pipeline.cli import tradeoff
from maml_pipeline.cli.parser import Parser
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.cli.terminal import configure_logging
from maml_pipeline.environment import child_environment
from maml_pipeline.errors import UserError
from maml_pipeline.runs.folder import REPORT
from maml_pipeline.slurm.submission import Allocation, allocation, check_sbatch_flags

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPTS = REPOSITORY / "slurm"
# cluster.env may say anything that a shell can do, so that a shell reads it.
SBATCH = 'set -a; source "$0"; exec sbatch "$@"'
GPUS = 'set -a; source "$0"; printf "%s\\n%s" "${MAML_GPUS_PER_NODE:-1}" "${MAML_GPU_TYPE-}"'


def run(arguments: Sequence[str]) -> None:
    """Check what is to be trained, and submit it with the nodes and devices that it names.

    Args:
        arguments: Those after `maml submit`; what comes after `--` goes to sbatch.

    Raises:
        UserError: The person can put it right.
    """
    configure_logging()
    own, sbatch_flags = _split(arguments)
    settings, own = _parse(own)
    if settings.dry_run or shutil.which("sbatch"):
        check_sbatch_flags(sbatch_flags, settings.tradeoff)
    else:
        raise UserError("there is no sbatch here; submit on a login node of a Slurm cluster")
    if not SCRIPTS.exists():
        raise UserError(f"{SCRIPTS} is missing; run maml from a checkout of its repository")
    submit = _submit_tradeoff if settings.tradeoff else _submit_fit
    submit(own, sbatch_flags, settings.dry_run)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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
        description="Submit slurm/train.sbatch, or with --tradeoff slurm/tradeoff.sbatch as an array "
        "and a report after it. Nodes, tasks and GPUs are those of the config's trainer.num_nodes, "
        "trainer.devices and trainer.accelerator. Further keys are those of `maml fit` or `maml "
        "tradeoff`; what comes after -- are flags of sbatch, such as --partition, --account, --time. "
        "slurm/cluster.env keeps those that never change.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--tradeoff", action="store_true", help="a trade-off: one job a cell, then a report"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print commands and script; submit nothing"
    )
    return parser.parse_known_args(arguments)


def _submit_fit(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    base = ResolvedConfig(arguments, elsewhere=True)
    given = _allocation(base.values)
    script = SCRIPTS / "train.sbatch"
    flags = [*given.sbatch_flags, f"--job-name=maml-{base.run_name}", *sbatch_flags]
    command = [*flags, str(script), *arguments, *given.fit_flags]
    if dry_run:
        _print_dry_run(script, command)
        return
    job = _sbatch(command)
    print(f"Submitted job {job}: {base.run_name} on {given}")


def _submit_tradeoff(arguments: list[str], sbatch_flags: list[str], dry_run: bool) -> None:
    if taken := {"--cell", "--report"} & {argument.partition("=")[0] for argument in arguments}:
        raise UserError(f"{taken.pop()} has no place here: submit sets it for each job")
    plan = tradeoff.Plan(arguments, elsewhere=True)
    given = _allocation(plan.shared)
    arguments = [*arguments, *given.fit_flags]
    # Once more with the devices that the jobs will ask for, which the folder's config then holds.
    plan = tradeoff.Plan(arguments, elsewhere=True)
    script = SCRIPTS / "tradeoff.sbatch"
    cells = plan.tradeoff.cells
    missing = [i for i, cell in enumerate(cells) if not plan.tradeoff.is_finished(cell)]
    # %a: an element of the array.
    array = [
        *given.sbatch_flags,
        f"--array={','.join(map(str, missing))}",
        f"--job-name=maml-{plan.experiment}-tradeoff",
        "--output=slurm-%A_%a.out",
        *sbatch_flags,
        str(script),
        *arguments,
    ]
    after = [f"--dependency=afterany:{'ARRAY' if dry_run else ''}"] if missing else []
    report = [
        *Allocation(nodes=1, devices=1, gpus="0").sbatch_flags,
        f"--job-name=maml-{plan.experiment}-report",
        *sbatch_flags,
        str(script),
        *arguments,
    ]
    if dry_run:
        _print_dry_run(script, *([array] if missing else []), [*after, *report])
        return
    plan.tradeoff.create(plan.shared)
    if missing:
        job = _sbatch(array)
        after = [f"--dependency=afterany:{job}"]
        print(f"Submitted array {job}: {len(missing)} cells of {plan.tradeoff.folder}, each on {given}")
    try:
        report_job = _sbatch([*after, *report])
    except UserError as error:
        raise UserError(
            f"the report is not submitted; make it later with `maml tradeoff ... --report`: {error}"
        ) from error
    print(f"Submitted job {report_job}: the report, {plan.tradeoff.folder / REPORT / 'report.html'}")


def _allocation(values: dict[str, Any]) -> Allocation:
    answer = _with_cluster_env(GPUS, []).stdout.partition("\n")
    return allocation(values["trainer"], gpus_per_node=answer[0], gpu_type=answer[2])


def _sbatch(command: Sequence[str]) -> str:
    """Submit, and return the job's id."""
    done = _with_cluster_env(SBATCH, ["--parsable", *command])
    return done.stdout.strip().partition(";")[0]  # a federation adds the cluster's name


def _with_cluster_env(script: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", script, str(SCRIPTS / "cluster.env"), *arguments]
    environment = child_environment(MAML_REPOSITORY=str(REPOSITORY))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["sbatch failed without a word"])[-1])
    return done


def _print_dry_run(script: Path, *commands: Sequence[str]) -> None:
    print(f"source {shlex.quote(str(SCRIPTS / 'cluster.env'))}")
    print(f"export MAML_REPOSITORY={shlex.quote(str(REPOSITORY))}")
    for command in commands:
        print(shlex.join(["sbatch", *command]))
    print(f"\n# {script}\n{script.read_text()}", end="")
