"""W&B sweeps: the agent of the real client runs `maml fit`, and each trial is a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from maml_pipeline import slurm
from maml_pipeline.cli import stopping
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.shipped_files import SWEEP
from maml_pipeline.signals import Stopped
from tests.helpers import meta_step, process_environment, read_config
from tests.slurm_cluster import Cluster, free_ports, wait_for
from tests.wandb_logs import assert_increasing, table_steps, wandb_id
from tests.wandb_stand_in import ENTITY, StandIn, Trial, at

FIRST = {"model.inner_lr": 0.05, "model.optimizer.init_args.lr": 0.003, "model.first_order": False}
SECOND = {"model.inner_lr": 0.02, "model.optimizer.init_args.lr": 0.001, "model.first_order": True}
SWEEP_PATH = f"{ENTITY}/comparison/sweep0"
LONG = {"trainer.max_steps": 100_000}


def sweep_config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(SWEEP.read_text())
    return loaded


# The shipped config -----------------------------------------------------------------------------


def corners() -> Iterator[dict[str, Any]]:
    """Return the extreme values of all parameters of the shipped sweep."""
    parameters = sweep_config()["parameters"]
    values = (spec.get("values") or [spec["min"], spec["max"]] for spec in parameters.values())
    for combination in product(*values):
        yield dict(zip(parameters, combination, strict=True))


@pytest.mark.parametrize("settings", [*corners()], ids=lambda settings: str([*settings.values()]))
def test_maml_fit_accepts_the_command_that_the_agent_builds(settings: dict[str, Any]) -> None:
    command = create_sweep_command(sweep_config()["command"])
    given = {key: {"value": value} for key, value in settings.items()}
    arguments = create_sweep_command_args({"args": given})["args"]
    at = command.index("${args}")
    built = [*command[:at], *arguments, *command[at + 1 :]]
    assert built[:2] == ["maml", "fit"]
    values = ResolvedConfig(built[2:]).values
    for key, value in settings.items():
        found: Any = values
        for part in key.split("."):
            found = found[part]
        assert found == value and type(found) is type(value)


def test_the_metric_of_the_sweep_is_the_monitored_one() -> None:
    sweep = sweep_config()
    run = ResolvedConfig(sweep["command"][2:-1]).values["run"]
    assert sweep["metric"]["name"] == run["monitor"]
    assert sweep["metric"]["goal"] == f"{run['mode']}imize"
    trainer = ResolvedConfig(sweep["command"][2:-1]).values["trainer"]
    validations = trainer["max_steps"] // trainer["val_check_interval"]
    bands = sweep["early_terminate"]
    assert bands["min_iter"] * bands["eta"] ** 2 < validations


def test_a_trial_never_requeues_the_job_of_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "requeue", lambda stop: pytest.fail("the job was requeued"))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    with pytest.raises(SystemExit) as stopped:
        stopping.end_stopped(Stopped(signal.SIGUSR1, meta_steps=3))
    assert stopped.value.code == 128 + signal.SIGUSR1


# A real agent -----------------------------------------------------------------------------------


def environment_of_agent(server: StandIn, folder: Path) -> dict[str, str]:
    """Return the variables of W&B's command line, without those of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where `maml` and `wandb` are
    own = {k: v for k, v in process_environment().items() if not k.startswith("WANDB_")}
    return {**own, **at(server), "PATH": path, "HOME": str(folder)}


def create_sweep(server: StandIn, folder: Path) -> None:
    """Create a sweep of short runs of the toy task, in which the settings of a trial come last."""
    short = "--trainer.max_steps 40 --trainer.val_check_interval 20 --data.test_tasks 9"
    quiet = "--trainer.enable_progress_bar false --run.checkpoint_every 100000"
    command = ["maml", "fit", "--config", "toy", *short.split(), *quiet.split(), "${args}"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**sweep_config(), "command": command}))
    create = [sys.executable, "-m", "wandb", "sweep", "--project", "comparison", "sweep.yaml"]
    environment = environment_of_agent(server, folder)
    subprocess.run(create, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)


@contextmanager
def agent(server: StandIn, folder: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    """Create a sweep, unless there is one, and start an agent."""
    if not server.sweeps:
        create_sweep(server, folder)
    start = [sys.executable, "-m", "wandb", "agent", "--forward-signals"]
    with (
        (folder / "agent.log").open("a") as log,
        subprocess.Popen(
            [*start, "--count", str(count), SWEEP_PATH],
            cwd=folder,
            env=environment_of_agent(server, folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        try:
            yield process
            assert process.wait(240) == 0
        finally:
            process.kill()


@pytest.mark.integration
def test_each_trial_of_an_agent_is_a_run_and_a_bad_one_is_ended(server: StandIn, tmp_path: Path) -> None:
    server.trials = [Trial("bad", FIRST | LONG, stops_after=3), Trial("good", SECOND)]
    with agent(server, tmp_path, count=2):
        pass
    bad, good = tmp_path / "runs" / "toy-second-s0", tmp_path / "runs" / "toy-first-s0"
    assert {*(tmp_path / "runs").iterdir()} == {bad, good}
    assert (wandb_id(bad), wandb_id(good)) == ("bad", "good")
    for folder, settings in ((bad, FIRST), (good, SECOND)):
        model = read_config(folder)["model"]
        assert model["inner_lr"] == settings["model.inner_lr"]
        assert model["optimizer"]["init_args"]["lr"] == settings["model.optimizer.init_args.lr"]
        assert model["first_order"] is settings["model.first_order"]
        run = server.runs[wandb_id(folder)]
        assert run.fields["sweep"] == "sweep0"
        assert [row["meta_step"] for row in run.history] == table_steps(folder)
        assert any("val/loss" in row for row in run.history)

    # The agent ended the bad one, whose state is saved; it is not one to be handed out again.
    log = (tmp_path / "agent.log").read_text()
    assert "Stopped after meta-step" in log and not (bad / "test.json").exists()
    assert 0 < meta_step(bad) < LONG["trainer.max_steps"]
    assert (good / "test.json").exists() and server.preempting == set()
    assert "Ignoring" not in log and "Traceback" not in log


@pytest.mark.integration
def test_a_preempted_trial_resumes_its_run_when_it_is_handed_out_again(
    server: StandIn, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "toy-second-s0"
    server.trials = [Trial("trial", FIRST | {"trainer.max_steps": 400})]
    with agent(server, tmp_path, count=1) as process:
        deadline = time.monotonic() + 180
        while not (folder / "metrics.csv").exists() or len(table_steps(folder)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
    stopped_at = meta_step(folder)
    assert 0 < stopped_at < 400
    assert server.preempting == {"trial"}

    server.trials[0].is_given = False
    with agent(server, tmp_path, count=1):
        pass
    assert [*(tmp_path / "runs").iterdir()] == [folder]
    assert f"Run folder: {folder.relative_to(tmp_path)}, from" in (tmp_path / "agent.log").read_text()
    assert meta_step(folder) == 400 and (folder / "test.json").exists()
    steps = [row["meta_step"] for row in server.runs["trial"].history]
    assert_increasing(steps)
    assert steps == table_steps(folder)


@pytest.mark.slurm
def test_agents_run_as_a_job_array_and_save_their_trial_before_the_time_limit(
    server: StandIn, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "state", free_ports(3))
    cluster.up()
    try:
        create_sweep(server, tmp_path)
        variables = {**environment_of_agent(server, tmp_path), "WANDB_MODE": "online"}
        server.trials = [Trial("trial", FIRST | {"trainer.max_steps": 400})]
        submit = ["sbatch", "--parsable", "--cpus-per-task=1", "--signal=SIGUSR1@120", "--array=0"]
        submit += ["--wrap", f"srun wandb agent --forward-signals --count 1 {SWEEP_PATH}"]
        job = cluster.run(tmp_path, *submit, **variables)
        folder = tmp_path / "runs" / "toy-second-s0"
        wait_for(lambda: (folder / "metrics.csv").exists(), "the first metrics", 180)
        wait_for(lambda: len(table_steps(folder)) >= 4, "some meta-steps")
        cluster.run(tmp_path, "scancel", "--signal=USR1", job)  # as Slurm does before the time limit
        assert cluster.wait(job)["JobState"] == "COMPLETED"
        assert 0 < meta_step(folder) < 400 and server.preempting == {"trial"}

        server.trials[0].is_given = False
        assert cluster.wait(cluster.run(tmp_path, *submit, **variables))["JobState"] == "COMPLETED"
        assert [*(tmp_path / "runs").iterdir()] == [folder]
        assert meta_step(folder) == 400 and (folder / "test.json").exists()
    finally:
        cluster.down()
