"""Every environment variable that the package reads or sets, with its type, meaning and default.

Modules read variables through this file only. An empty variable counts as unset. Importing the package
sets none.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from maml_pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    Args:
        name: Name of the variable.
        meaning: What it controls.
        set_by: Who sets it.
        convert: Converts its text; raises `ValueError` for malformed text.
        must_be: The valid values, to complete "it must be ...".
        default: Value where the variable is unset or empty.
    """

    name: str
    meaning: str
    set_by: str
    convert: Callable[[str], T]
    must_be: str
    default: T

    def get(self) -> T:
        """Return the value, or the default.

        Raises:
            UserError: The value is malformed.
        """
        text = os.environ.get(self.name, "")
        return self.parse(text) if text.strip() else self.default

    def require(self) -> T:
        """Return the value.

        Raises:
            UserError: The variable is unset, or its value is malformed.
        """
        return self.parse(os.environ.get(self.name, ""))

    def parse(self, text: str) -> T:
        """Convert a value of this variable that was read elsewhere, such as by a shell.

        Raises:
            UserError: The value is malformed.
        """
        try:
            return self.convert(text)
        except ValueError:
            raise UserError(
                f"environment variable {self.name} is {text.strip() or 'not set'}; "
                f"it must be {self.must_be}"
            ) from None

    def is_set(self) -> bool:
        """Tell whether the variable is set and not empty."""
        return bool(os.environ.get(self.name, "").strip())

    def set(self, value: str) -> None:
        """Set the variable for this process and its children."""
        os.environ[self.name] = value

    @contextlib.contextmanager
    def defaulting_to(self, value: str) -> Iterator[None]:
        """Set the variable within the context, unless the user has."""
        if self.name in os.environ:
            yield
            return
        os.environ[self.name] = value
        try:
            yield
        finally:
            del os.environ[self.name]


def child_environment(**changes: str | None) -> dict[str, str]:
    """Return the environment of a child process.

    Args:
        changes: Variables to set, or to remove if the value is `None`.
    """
    changed = {**os.environ, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def check_environment() -> None:
    """Validate the variables that libraries read when they are imported, and those of W&B.

    Removes empty variables that Lightning would read as numbers. Imports no library.

    Raises:
        UserError: A value is malformed.
    """
    for name in (*(rank.name for rank in RANKS), SLURM_NTASKS.name):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    for variable in (*RANKS, OFFLINE, PARALLEL_CELLS, WANDB_MODE, WANDB_DISABLED):
        variable.get()


# Types of values --------------------------------------------------------------------------------


def _text(text: str) -> str:
    return text


def _whole_number(text: str) -> int:
    if not (text.isascii() and text.strip().isdecimal()):
        raise ValueError
    return int(text)


def _positive_number(text: str) -> int:
    if (number := _whole_number(text)) < 1:
        raise ValueError
    return number


def _flag(text: str) -> bool:
    if text.strip().lower() in ("1", "true", "yes", "on"):
        return True
    if text.strip().lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError


def _wandb_mode(text: str) -> str:
    if text not in ("online", "offline", "disabled", "dryrun", "run", "shared"):
        raise ValueError
    return text


def _text_variable(name: str, meaning: str, set_by: str) -> Variable[str | None]:
    return Variable(name, meaning, set_by, convert=_text, must_be="text", default=None)


FLAG = "1 or 0"


# This project's variables -----------------------------------------------------------------------

OMNIGLOT_ROOT: Variable[Path] = Variable(
    "MAML_OMNIGLOT_ROOT",
    "Folder of the Omniglot data set, where `data.tasks.root` is not set.",
    set_by="the user, or cluster.env",
    convert=Path,
    must_be="a folder",
    default=Path("data/omniglot"),
)
OFFLINE: Variable[bool] = Variable(
    "MAML_OFFLINE",
    "Never download a data set.",
    set_by="the user; slurm/launch.sh and `maml fit` in a Slurm job, where all ranks would download",
    convert=_flag,
    must_be=FLAG,
    default=False,
)
RUN_DIR: Variable[Path | None] = Variable(
    "MAML_RUN_DIR",
    "The run folder, for the ranks that Lightning starts.",
    set_by="`maml fit` on rank 0",
    convert=Path,
    must_be="a folder",
    default=None,
)
GPUS_PER_NODE: Variable[int] = Variable(
    "MAML_GPUS_PER_NODE",
    "GPUs that `maml submit` requests on each node where `trainer.devices` is auto or -1.",
    set_by="the user, or cluster.env",
    convert=_positive_number,
    must_be="a number from 1",
    default=1,
)
CLUSTER_ENV: Variable[Path | None] = Variable(
    "MAML_CLUSTER_ENV",
    "File with the settings of the cluster; default: cluster.env in the user's config folder or, where "
    "there is none, beside the job scripts.",
    set_by="the user; `maml submit` for its jobs",
    convert=Path,
    must_be="a file",
    default=None,
)
JOB_SCRIPTS = _text_variable(
    "MAML_JOB_SCRIPTS",
    "Folder of the job scripts; default: slurm/ in the submission folder.",
    set_by="`maml submit`",
)
PYTHON = _text_variable(
    "MAML_PYTHON",
    "The Python that runs `maml` in a job; default: .venv/bin/python in the submission folder.",
    set_by="`maml submit`, to the Python that it runs with",
)

PARALLEL_CELLS: Variable[int | None] = Variable(
    "MAML_PARALLEL_CELLS",
    "Number of cells that a trade-off trains side by side, of which this run is one.",
    set_by="`maml tradeoff` for its cells",
    convert=_positive_number,
    must_be="a number from 1",
    default=None,
)

# Ranks and distributed training -----------------------------------------------------------------


def _rank(name: str, set_by: str) -> Variable[int | None]:
    meaning = "Rank of this process; Lightning reads it when it is imported."
    return Variable(name, meaning, set_by, _whole_number, "a number, or unset", default=None)


RANKS = (
    _rank("RANK", set_by="torchrun"),
    _rank("LOCAL_RANK", set_by="torchrun, or Lightning for the ranks that it starts"),
    _rank("SLURM_PROCID", set_by="srun"),
    _rank("JSM_NAMESPACE_RANK", set_by="jsrun"),
)
"""Where Lightning looks for the rank of a process, in this order."""

MASTER_ADDR = _text_variable(
    "MASTER_ADDR",
    "Address of the node of rank 0.",
    set_by="slurm/launch.sh, torchrun, or the user on each node",
)
MASTER_PORT: Variable[int | None] = Variable(
    "MASTER_PORT",
    "Port on which rank 0 listens.",
    set_by="slurm/launch.sh, torchrun, or the user on each node",
    convert=_positive_number,
    must_be="a port number",
    default=None,
)
NODE_RANK: Variable[int | None] = Variable(
    "NODE_RANK",
    "Number of this node, from 0.",
    set_by="the user on each node, where neither Slurm nor torchrun starts the processes",
    convert=_whole_number,
    must_be="a number from 0",
    default=None,
)

# Slurm ------------------------------------------------------------------------------------------


def _slurm_text(name: str, meaning: str) -> Variable[str | None]:
    return _text_variable(f"SLURM_{name}", meaning, set_by="Slurm")


def _slurm_number(name: str, meaning: str, default: int) -> Variable[int]:
    must_be = (
        "a whole number, as Slurm sets it: start with srun or sbatch, or unset the SLURM_ variables"
    )
    return Variable(f"SLURM_{name}", meaning, "Slurm", _whole_number, must_be, default)


SLURM_JOB_ID = _slurm_text("JOB_ID", "Id of the job; set in every job.")
SLURM_JOB_NAME = _slurm_text("JOB_NAME", "Name of the job; `bash` or `interactive` for a shell.")
SLURM_ARRAY_JOB_ID = _slurm_text("ARRAY_JOB_ID", "Id of the job array.")
SLURM_ARRAY_TASK_ID = _slurm_text("ARRAY_TASK_ID", "Index of the job in its array.")
SLURM_RESTART_COUNT = _slurm_number("RESTART_COUNT", "Number of times the job was requeued.", default=0)
SLURM_NTASKS = _slurm_number("NTASKS", "Tasks of the job: one per device.", default=1)
SLURM_NNODES = _slurm_number("NNODES", "Nodes of the job.", default=1)
SLURM_NTASKS_PER_NODE = _slurm_number("NTASKS_PER_NODE", "Tasks on each node.", default=1)
SLURM_PROCID = _slurm_number("PROCID", "Rank of this process in the job.", default=0)
SLURM_LOCALID = _slurm_number("LOCALID", "Rank of this process on its node.", default=0)
SLURM_NODEID = _slurm_number("NODEID", "Number of this node in the job.", default=0)

# W&B --------------------------------------------------------------------------------------------

WANDB_MODE: Variable[str | None] = Variable(
    "WANDB_MODE",
    "Whether W&B logs online, offline or not at all; default: online if logged in, else offline.",
    set_by="the user; slurm/launch.sh sets offline unless the user has set it",
    convert=_wandb_mode,
    must_be="online, offline or disabled",
    default=None,
)
WANDB_DISABLED: Variable[bool] = Variable(
    "WANDB_DISABLED",
    "Do not log to W&B.",
    set_by="the user",
    convert=_flag,
    must_be=FLAG,
    default=False,
)
WANDB_API_KEY = _text_variable(
    "WANDB_API_KEY",
    "API key; default: the one that `wandb login` stored in the netrc file.",
    set_by="the user",
)
WANDB_BASE_URL: Variable[str] = Variable(
    "WANDB_BASE_URL",
    "Address of the W&B server.",
    set_by="the user",
    convert=_text,
    must_be="a URL",
    default="https://api.wandb.ai",
)
WANDB_RUN_ID = _text_variable(
    "WANDB_RUN_ID",
    "Id of a new W&B run. `maml tradeoff` removes it for its cells, each of which is its own run.",
    set_by="the agent of a W&B sweep, or the user",
)
WANDB_SWEEP_ID = _text_variable(
    "WANDB_SWEEP_ID",
    "Id of the W&B sweep of which this run is a trial.",
    set_by="the agent of a W&B sweep",
)
WANDB_RESUME = _text_variable(
    "WANDB_RESUME",
    "Whether W&B may append to an existing run.",
    set_by="`maml sync`, for the later parts of a resumed run",
)
WANDB_SILENT = _text_variable(
    "WANDB_SILENT",
    "Whether W&B prints no messages.",
    set_by="`maml dashboard`, unless the user has set it",
)
NETRC = _text_variable(
    "NETRC",
    "The netrc file in which `wandb login` stores the API key; default: ~/.netrc.",
    set_by="the user",
)

# Libraries --------------------------------------------------------------------------------------

CUDA_VISIBLE_DEVICES = _text_variable(
    "CUDA_VISIBLE_DEVICES",
    "GPUs that this process may use, by number, UUID or MIG name; default: all.",
    set_by="the user, Slurm, or `maml tradeoff --parallel` for each of its cells",
)
OMP_NUM_THREADS = _text_variable(
    "OMP_NUM_THREADS",
    "CPU threads of a process; default: one per core.",
    set_by="the user; otherwise slurm/launch.sh (SLURM_CPUS_PER_TASK) and `maml tradeoff --parallel`, "
    "which divides the cores between the cells",
)
KINETO_LOG_LEVEL = _text_variable(
    "KINETO_LOG_LEVEL",
    "Least severity that PyTorch's profiler prints; at 99 it prints nothing.",
    set_by="the memory meter, unless the user has set it: the profiler reports that there is no GPU",
)
NVML_CUDA_CHECK = _text_variable(
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "Whether PyTorch asks NVML for GPUs; importing Lightning sets 1.",
    set_by="`maml fit` sets 0 without a GPU: Adam asks in every step, and each time loads NVML again",
)

# Variables that only shell scripts and scripts/*.py use -----------------------------------------

SCRIPT_VARIABLES = {
    "MAML_COMMAND": "How a job starts `maml`, such as in a container; default: MAML_PYTHON.",
    "MAML_SRUN_OPTIONS": "Further options of a job's srun; default: none.",
    "MAML_GPU_TYPE": "Type of GPU that `maml submit` requests; default: any.",
    "MAML_LOCAL_SLURM": "State folder of scripts/local_slurm.sh; default: maml-local-slurm in TMPDIR.",
    "MAML_LOCAL_SLURM_OF": "State folder, set by scripts/local_slurm.sh for its daemons.",
    "MAML_LOCAL_SLURM_PORT": "First of its three ports; default: 17000.",
    "MAML_VERSIONS_ENV": "Environment of scripts/test_versions.sh; default: .venv-oldest, .venv-newest.",
    "SLURM_CONF": "Slurm's configuration file; scripts/local_slurm.sh prints the one it made.",
    "SLURM_CPUS_PER_TASK": "CPUs of each task; default: 1. Set by Slurm.",
    "SLURM_GPUS_ON_NODE": "GPUs of the job on this node; unset without any. Set by Slurm.",
    "SLURM_JOB_NODELIST": "Names of the job's nodes. Set by Slurm.",
    "SLURM_SUBMIT_DIR": "Folder in which sbatch was called. Set by Slurm.",
    "TMPDIR": "Folder for temporary files; default: /tmp.",
}
"""Name, meaning, default and who sets it, of variables that no module of the package reads."""
