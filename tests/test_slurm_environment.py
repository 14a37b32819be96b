"""Slurm's environment variables, without a Slurm cluster: jobs, shells and malformed values."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from maml_pipeline import slurm
from maml_pipeline.cli.cluster_environment import cluster_environment
from maml_pipeline.signals import Stopped
from tests.helpers import CONFIGS, SHORT, SHORT_NAME, Maml, meta_step, read_config, read_files

pytestmark = pytest.mark.integration

Slurm = Callable[..., None]

SRUN = {
    **{"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"},
    **{"NTASKS_PER_NODE": "1", "NNODES": "1"},
}


@pytest.fixture
def in_slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Return a function that sets Slurm's variables as in a job."""
    monkeypatch.setenv("MAML_OFFLINE", "")  # which a run in a job sets
    monkeypatch.setattr(slurm, "requeue", lambda stop: False)

    def enter(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return enter


# Requeueing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "by_all", "tasks", "record", "is_requeued"),
    [
        pytest.param(signal.SIGUSR1, False, 2, "PreemptTime=None", True, id="time limit"),
        pytest.param(signal.SIGTERM, False, 2, "PreemptTime=2026-11-29T12:00:00", True, id="preempted"),
        pytest.param(signal.SIGTERM, False, 2, "PreemptTime=None", False, id="another rank failed"),
        pytest.param(signal.SIGTERM, True, 2, "PreemptTime=None", True, id="saved by all ranks"),
        pytest.param(signal.SIGTERM, False, 1, "PreemptTime=None", True, id="the only rank"),
    ],
)
def test_a_job_is_requeued_unless_another_rank_has_failed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    signum: signal.Signals,
    by_all: bool,
    tasks: int,
    record: str,
    is_requeued: bool,
) -> None:
    shown = f"JobId=7 JobState=RUNNING {record}"
    commands = {"squeue": "echo RUNNING", "scontrol": f'echo "$*" >>{tmp_path}/asked; echo "{shown}"'}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    assert slurm.requeue(Stopped(signum, by_all=by_all)) is is_requeued
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert ("requeue 7" in asked) is is_requeued


# Two runs in one job ----------------------------------------------------------------------------


def start_both(maml: Maml) -> None:
    for inner_lr in (0.1, 0.02):
        maml("fit", *SHORT, "--model.inner_lr", inner_lr)


def test_two_runs_in_one_job_resume_in_their_own_folders(in_slurm: Slurm, maml: Maml) -> None:
    in_slurm(JOB_ID="7")
    start_both(maml)
    first, second = Path("runs", SHORT_NAME), Path("runs", f"{SHORT_NAME}-2")
    before = {name: content for name, content in read_files(first).items() if name != "metrics.csv"}
    # The job was killed in the second run, after its last checkpoint.
    (second / "test.json").unlink()
    in_slurm(RESTART_COUNT="1")
    start_both(maml)
    assert {path.name for path in Path("runs").iterdir()} == {first.name, second.name}
    assert (second / "test.json").exists()
    assert {name: read_files(first)[name] for name in before if "ckpt" not in name} == {
        name: content for name, content in before.items() if "ckpt" not in name
    }
    assert [read_config(folder)["model"]["inner_lr"] for folder in (first, second)] == [0.1, 0.02]


def test_a_job_killed_before_its_first_checkpoint_starts_over_in_its_folder(
    in_slurm: Slurm, maml: Maml
) -> None:
    in_slurm(JOB_ID="7")
    maml("fit", *SHORT)
    for checkpoint in Path("runs", SHORT_NAME, "checkpoints").iterdir():
        checkpoint.unlink()
    in_slurm(RESTART_COUNT="1")
    maml("fit", *SHORT)
    assert [path.name for path in Path("runs").iterdir()] == [SHORT_NAME]
    assert meta_step(Path("runs", SHORT_NAME)) == 12


@pytest.mark.parametrize(
    "variables", [{"JOB_ID": "8", "RESTART_COUNT": "1"}, {"JOB_ID": "7"}, {"RESTART_COUNT": "1"}]
)
def test_only_a_restarted_job_resumes_its_run(
    variables: dict[str, str], in_slurm: Slurm, maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(JOB_ID="7")
    maml("fit", *SHORT)
    before = read_files(Path("runs", SHORT_NAME))
    monkeypatch.delenv("SLURM_JOB_ID")
    in_slurm(**variables)
    maml("fit", *SHORT)
    assert read_files(Path("runs", SHORT_NAME)) == before and Path("runs", f"{SHORT_NAME}-2").exists()


# Nothing is downloaded --------------------------------------------------------------------------


def test_nothing_is_downloaded_in_a_job(
    in_slurm: Slurm, maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr("torchvision.datasets.Omniglot.__init__", download)
    in_slurm(JOB_ID="7")
    config = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml", "--config", CONFIGS / "cpu.yaml")
    error = maml_error("fit", *config, "--data.tasks.root", tmp_path / "none")
    assert (
        "does not contain Omniglot, and Slurm jobs and runs with MAML_OFFLINE set download nothing"
        in error
    )
    assert "maml prepare omniglot" in error
    assert not list(tmp_path.iterdir())


# Shells and malformed values --------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables",
    [
        {"NTASKS": "1", "JOB_NAME": "my-experiment"},  # salloc --job-name=my-experiment
        {"NTASKS": "4", "JOB_NAME": "my-experiment", "RESTART_COUNT": ""},
        {"NTASKS": "x"},
        {"NTASKS": "1", "JOB_NAME": "bash", **SRUN},  # srun --pty bash
        {"RESTART_COUNT": ""},
    ],
)
def test_a_shell_in_a_job_trains_like_any_other(
    variables: dict[str, str], in_slurm: Slurm, maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NAME", raising=False)
    in_slurm(JOB_ID="7", **variables)
    assert not slurm.starts_processes()
    assert all(isinstance(plugin, LightningEnvironment) for plugin in cluster_environment())
    assert bool(cluster_environment()) == ("NTASKS" in variables)
    maml("fit", *SHORT)
    assert Path("runs", SHORT_NAME, "test.json").exists()


def test_a_task_started_by_srun_uses_slurms_environment(in_slurm: Slurm, maml: Maml) -> None:
    in_slurm(JOB_ID="7", JOB_NAME="maml", **SRUN)
    assert slurm.starts_processes()
    (plugin,) = cluster_environment()
    assert isinstance(plugin, SLURMEnvironment) and not plugin.auto_requeue
    maml("fit", *SHORT)
    assert Path("runs", SHORT_NAME, "slurm_job.txt").read_text() == "7\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NODEID", ""),
        ("LOCALID", ""),
        ("NTASKS", "x"),
        ("PROCID", "zero"),
        ("NNODES", "-1"),
        ("NTASKS_PER_NODE", "2(x3)"),
        ("RESTART_COUNT", "abc"),
    ],
)
def test_a_variable_that_is_not_a_number_is_a_one_line_error(
    name: str, value: str, in_slurm: Slurm, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    in_slurm(JOB_ID="7", JOB_NAME="maml", **{**SRUN, name: value})
    error = maml_error("fit", *SHORT)
    assert f"SLURM_{name} is {value or 'not set'}" in error
    assert not list(tmp_path.iterdir())


def test_an_empty_rank_is_ignored(in_slurm: Slurm, maml: Maml) -> None:
    in_slurm(PROCID="")
    maml("fit", *SHORT)
    assert Path("runs", SHORT_NAME, "test.json").exists()
