"""Helpers of several test files: `maml` in a process, small trainings, readers of a run's files."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning import Trainer
from torch import Tensor, nn

from maml_pipeline import MetaLearner
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.metrics_table import MetricsRow
from maml_pipeline.runs.run import Run
from maml_pipeline.varied import folder_suffix

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TOY = ("--config", CONFIGS / "toy.yaml", "--trainer.enable_progress_bar", "false")
"""The settings of the toy task, for commands such as `maml("fit", *TOY)`."""

SHORT = (
    *(*TOY, "--trainer.max_steps", 12, "--trainer.val_check_interval", 4),
    *("--data.val_tasks", 5, "--data.test_tasks", 9, "--probes.every", 100),
)
SHORT_NAME = "toy-second-s0"
"""The folder below `runs/` that `maml("fit", *SHORT)` makes."""

RUN = (
    *("fit", "--config", CONFIGS / "toy.yaml"),
    *("--trainer.max_steps", 300, "--trainer.val_check_interval", 50),
    *("--trainer.log_every_n_steps", 7, "--run.checkpoint_every", 20),
    *("--data.val_tasks", 10, "--data.test_tasks", 10),
)
"""A run that is long enough to stop and resume."""

Maml = Callable[..., str]
"""Run the command in this process and return what it printed: the fixtures `maml` and `maml_error`."""

TIMINGS = (
    *("speed/meta_step_ms", "speed/tasks_per_second", "speed/flops_per_second"),
    "speed/parallel_cells",
)
"""Metrics that differ between two runs of the same settings."""


# Processes --------------------------------------------------------------------------------------


def process_environment(**changes: str) -> dict[str, str]:
    """Return the environment for a child process that imports this package and these tests.

    The child starts its own W&B service: one that this process started would outlive a killed child, and
    keep its run in use.
    """
    own = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def maml_command(*arguments: object) -> list[str]:
    """Return the command line that runs `maml` in a child process."""
    return [sys.executable, "-m", "maml_pipeline", *map(str, arguments)]


def maml_process(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `maml` in a child process that inherits no W&B settings."""
    kept = {k: v for k, v in process_environment().items() if not k.startswith("WANDB_")}
    command = maml_command(*arguments)
    return subprocess.run(command, env=kept | changes, capture_output=True, text=True, timeout=240)


def run_python(script: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter; settings go to `subprocess.run`."""
    defaults: dict[str, Any] = {
        "env": process_environment(),
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, text=True, timeout=240, **(defaults | settings))


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    """Hold the lock file in a child process."""
    script = "import fcntl, signal; fcntl.flock(0, fcntl.LOCK_EX); print(flush=True); signal.pause()"
    with (
        path.open("w") as lock,
        subprocess.Popen([sys.executable, "-c", script], stdin=lock, stdout=subprocess.PIPE) as other,
    ):
        assert other.stdout is not None and other.stdout.readline()
        try:
            yield
        finally:
            other.kill()


# Training ---------------------------------------------------------------------------------------


def make_trainer(**settings: Any) -> Trainer:
    """Build a CPU trainer that is limited by meta-steps only, prints nothing and writes nothing."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | settings))


def fit_until_ctrl_c(
    maml: Maml, capsys: pytest.CaptureFixture[str], meta_step: int, *arguments: object
) -> str:
    """Run `maml fit`, press Ctrl-C during a meta-step, and return the output."""
    training_step = MetaLearner.training_step

    def interrupted(learner: MetaLearner, *batch: Any) -> Any:
        if learner.global_step + 1 == meta_step:
            os.kill(os.getpid(), signal.SIGINT)
        return training_step(learner, *batch)

    # A callback in the config would stop the resumed run as well.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaLearner, "training_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            maml("fit", *arguments)
    assert stopped.value.code == 128 + signal.SIGINT
    return capsys.readouterr().out


def network_weights(learner: MetaLearner) -> Tensor:
    """Return a copy of all parameters as one vector."""
    return nn.utils.parameters_to_vector(learner.network.parameters()).detach().clone()


# A run on disk ----------------------------------------------------------------------------------


def read_checkpoint(folder: Path, which: str = "last") -> dict[str, Any]:
    """Read a run's `last` or `best` checkpoint."""
    path = folder / "checkpoints" / f"{which}.ckpt"
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def checkpoint_tensors(folder: Path, which: str = "last") -> dict[str, Tensor]:
    """Read the weights, Adam's moments and the meta-step of a checkpoint."""
    loaded = read_checkpoint(folder, which)
    moments = loaded["optimizer_states"][0]["state"]
    adam = {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}
    weights: dict[str, Tensor] = loaded["state_dict"]
    return weights | adam | {"meta_step": torch.tensor(loaded["global_step"])}


def meta_step(folder: Path, which: str = "last") -> int:
    """Return the number of meta-steps after which a checkpoint was saved."""
    return int(read_checkpoint(folder, which)["global_step"])


def final_weights(folder: Path) -> Tensor:
    """Read the weights of `last.ckpt` as one vector."""
    return torch.cat([value.flatten() for value in read_checkpoint(folder)["state_dict"].values()])


def read_config(folder: Path) -> dict[str, Any]:
    """Read the resolved settings of a run."""
    loaded: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    return loaded


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Read the rows of metrics.csv as text."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def untimed_metrics(folder: Path) -> list[dict[str, str]]:
    """Read the rows of metrics.csv without `TIMINGS`."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder)]


def read_files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """Compare two finished runs: checkpoints bit by bit, metrics, and the test result."""
    for which in ("last", "best"):
        ours, theirs = checkpoint_tensors(one, which), checkpoint_tensors(other, which)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert untimed_metrics(one) == untimed_metrics(other)
    assert (one / "test.json").read_text() == (other / "test.json").read_text()


# Runs that were never trained -------------------------------------------------------------------


def make_run(
    order: GradientOrder,
    inner_steps: int,
    seed: int = 0,
    *,
    result: float = 0.5,
    ci95: float = 0.01,
    peak_bytes: float = 1e6,
    experiment: str = "sine",
    measure: str = "loss",
    history: Sequence[MetricsRow] = (),
    varied: Mapping[str, Any] | None = None,
) -> Run:
    """Return a tested run with the given result and peak memory, and with no files.

    Args:
        order: Its gradient order, and how it is computed.
        inner_steps: Its inner steps in training and at test.
        seed: Its seed.
        result: The measure on the test tasks.
        ci95: Half the width of its confidence interval.
        peak_bytes: The peak memory of a meta-step.
        experiment: Its experiment.
        measure: `loss` (lower is better) or another measure (higher is better).
        history: Further logged rows, in order of their meta-steps.
        varied: The value of each varied key, such as `model.inner_lr`.
    """
    model = {
        "first_order": order.first_order,
        "differentiated_steps": order.differentiated_steps,
        "method": str(order.method),
        "inner_steps": inner_steps,
    }
    config: dict[str, Any] = {
        "seed_everything": seed,
        "model": model,
        "data": {},
        "trainer": {"max_steps": 100, "precision": None},
        "run": {
            "experiment": experiment,
            "monitor": f"val/{measure}",
            "mode": "min" if measure == "loss" else "max",
        },
    }
    for key, value in (varied or {}).items():
        *parents, last = key.split(".")
        inner: dict[str, Any] = config
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    if varied is not None:
        config["run"] |= {"varied": [*varied]}
    costs = {"memory/meta_step_peak_bytes": peak_bytes, "speed/meta_step_ms": 10 * peak_bytes / 1e6}
    test = {f"test/{measure}": result, f"test/{measure}_ci95": ci95}
    for step in range(inner_steps + 1):
        test |= {f"test/{measure}_step_{step}": result, f"test/{measure}_step_{step}_ci95": ci95}
    name = f"{order}-k{inner_steps}{folder_suffix(varied or {})}-s{seed}"
    return Run(Path(experiment) / name, config, [*history, {"step": 99, **costs}], test)
