"""Jobs on a real Slurm cluster: on two nodes, preempted, killed, in arrays, or invalid."""

import contextlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maml_pipeline.learner.tracking import find_wandb_logs, read_wandb_log
from maml_pipeline.tradeoff.cells import meta_steps_done
from tests.helpers import CONFIGS, assert_same_run, checkpoint_tensors, untimed_metrics
from tests.slurm_cluster import Cluster, free_ports, wait_for

pytestmark = pytest.mark.slurm

TOY = (
    *("--config", CONFIGS / "toy.yaml", "--trainer.enable_progress_bar", "false"),
    *("--probes.memory", "false", "--probes.speed", "false"),
    *("--data.val_tasks", 20, "--data.test_tasks", 20),
)
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
LONG = 2000
MAML = (sys.executable, "-m", "maml_pipeline")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "state", free_ports(3))
    cluster.up()
    yield cluster
    cluster.down()


def log(folder: Path, job: str) -> str:
    return (folder / f"slurm-{job}.out").read_text()


def list_runs(cluster: Cluster, folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """Return what `maml runs --json` prints."""
    printed = cluster.run(folder, *MAML, "runs", *arguments, "--json")
    listed: list[dict[str, Any]] = json.loads(printed)
    return listed


def state_of(cluster: Cluster, folder: Path) -> tuple[str, str | None, str | None]:
    """Return the state, the job and the reason of the only run."""
    (run,) = list_runs(cluster, folder)
    return run["state"], run["job"], run["reason"]


def wait_for_meta_step(run: Path, meta_step: int) -> None:
    wait_for(lambda: meta_steps_done(run) > meta_step, f"meta-step {meta_step} of {run}", 90)


def test_two_nodes_train_the_same_weights_as_one_process(cluster: Cluster, tmp_path: Path) -> None:
    double = (*TOY, "--trainer.precision", "64-true", "--trainer.max_steps", 60)
    two = cluster.train(tmp_path, TWO_NODES, *double, "--run.dir", "two")
    one = cluster.train(tmp_path, [], *double, "--run.dir", "one")
    assert cluster.wait(two)["JobState"] == "COMPLETED", log(tmp_path, two)
    assert cluster.wait(one)["JobState"] == "COMPLETED", log(tmp_path, one)
    weights = [checkpoint_tensors(tmp_path / run) for run in ("one", "two")]
    assert weights[0]["network.weight"].dtype == torch.float64
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-9)
    # Only rank 0 writes: one folder per run.
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"one", "two"}


def test_preemption_never_changes_the_run(cluster: Cluster, tmp_path: Path) -> None:
    run = (*TOY, "--trainer.max_steps", LONG, "--run.checkpoint_every", 1000)
    whole = cluster.train(tmp_path, TWO_NODES, *run, "--run.dir", "whole", WANDB_MODE="offline")
    assert cluster.wait(whole)["JobState"] == "COMPLETED", log(tmp_path, whole)

    folder = tmp_path / "preempted"
    job = cluster.train(tmp_path, TWO_NODES, *run, "--run.dir", "preempted", WANDB_MODE="offline")
    meta_steps = sorted(random.sample(range(100, LONG - 700), 3))
    print(f"preempted at about {meta_steps}")
    saved: list[int] = []
    for count, meta_step in enumerate(meta_steps, 1):
        # Beyond the state it resumed from: a signal before the first meta-step saves nothing.
        wait_for_meta_step(folder, max(meta_step, *saved, 0))
        if count < 3:
            cluster.run(tmp_path, "scancel", "--signal=USR1", job)
        else:
            # As a job of a partition with a higher priority does.
            urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
            cluster.run(tmp_path, "sbatch", *urgent, "--output=/dev/null")
        wait_for(lambda count=count: int(cluster.show(job)["Restarts"]) == count, "the requeueing")  # type: ignore[misc]
        saved.append(int(checkpoint_tensors(folder)["meta_step"]))
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "3"), log(tmp_path, job)
    # Each was saved because of its signal, not at a multiple of checkpoint_every.
    assert all(a > b for a, b in zip(saved, meta_steps, strict=True)) and saved[-1] < LONG
    assert log(tmp_path, job).count("its state is saved") == 3
    assert_same_run(tmp_path / "whole", folder)

    logs = find_wandb_logs(folder)
    assert len(logs) == 1, "W&B keeps one id"
    steps = [[row["step"] for row in read_wandb_log(part)[1]] for part in next(iter(logs.values()))]
    assert len(steps) == 4
    recorded = [step for part in steps for step in part]
    (whole_log,) = next(iter(find_wandb_logs(tmp_path / "whole").values()))
    assert recorded == [row["step"] for row in read_wandb_log(whole_log)[1]]


def test_a_job_preempted_before_its_first_meta_step_is_requeued(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = (*TOY, "--trainer.max_steps", 40, "--run.dir", "early")
    job = cluster.train(tmp_path, [], *run)
    config = tmp_path / "early" / "config.yaml"
    for count, has_happened in enumerate((lambda: imports_torch(cluster, job), config.exists), 1):
        wait_for(has_happened, "the imports" if count == 1 else str(config))
        cluster.run(tmp_path, "scancel", "--signal=TERM", job)
        wait_for(lambda count=count: int(cluster.show(job)["Restarts"]) == count, "the requeueing")  # type: ignore[misc]
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "2"), log(tmp_path, job)
    assert log(tmp_path, job).count("is requeued") == 2
    assert int(checkpoint_tensors(tmp_path / "early")["meta_step"]) == 40


def test_a_job_preempted_before_it_handles_signals_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    # As in the first milliseconds of Python.
    started = tmp_path / "started"
    (tmp_path / "starts.sh").write_text(f"touch {started}\nexec sleep 60\n")
    job = cluster.train(tmp_path, [], MAML_COMMAND=f"bash {tmp_path}/starts.sh")
    wait_for(started.exists, "the start")
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"]
    cluster.run(tmp_path, "sbatch", *urgent, "--output=/dev/null")
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", "the requeueing")
    assert "the job is requeued, restart 1" in log(tmp_path, job)
    cluster.run(tmp_path, "scancel", job)


def imports_torch(cluster: Cluster, job: str) -> bool:
    """Return whether a job's process has loaded PyTorch's libraries."""
    shown = cluster.show(job)
    if shown["JobState"] == "RUNNING":
        with contextlib.suppress(AssertionError, OSError):  # its step has not started
            pids = cluster.processes(job, shown["NodeList"])
            return any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return False


def test_a_killed_rank_fails_its_job_which_is_requeued_and_resumes(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    run = (*TOY, "--trainer.max_steps", 1500, "--run.checkpoint_every", 100)
    whole = cluster.train(tmp_path, TWO_NODES, *run, "--run.dir", "whole")
    cluster.wait(whole)
    job = cluster.train(tmp_path, TWO_NODES, *run, "--run.dir", "killed")
    wait_for_meta_step(folder, 350)
    (pid,) = cluster.processes(job, "n2")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", "the requeueing")
    assert int(checkpoint_tensors(folder)["meta_step"]) % 100 == 0
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log(tmp_path, job)
    assert "rank 1 was killed by signal 9" in log(tmp_path, job)
    assert_same_run(tmp_path / "whole", folder)


def test_a_killed_rank_requeues_its_job_also_if_srun_must_kill_the_others(
    cluster: Cluster, tmp_path: Path
) -> None:
    # As a rank that waits for the killed one in C code: srun returns its status, not that of the killed.
    script = (
        "if [ $SLURM_PROCID = 0 ]; then trap '' TERM; exec sleep 100; fi",
        "sleep 1",
        "kill -9 $$",
    )
    (tmp_path / "dies.sh").write_text("\n".join(script))
    job = cluster.train(tmp_path, TWO_NODES, MAML_COMMAND=f"bash {tmp_path}/dies.sh")
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", "the requeueing")
    cluster.run(tmp_path, "scancel", job)
    assert "rank 1 was killed by signal 9" in log(tmp_path, job)


def test_a_killed_element_of_an_array_requeues_itself_only(cluster: Cluster, tmp_path: Path) -> None:
    # The one whose own id is also that of the whole array.
    script = (
        "if [ $SLURM_JOB_ID = $SLURM_ARRAY_JOB_ID ] && [ -z $SLURM_RESTART_COUNT ]; then",
        "until [ -e other ]; do sleep 0.1; done; kill -9 $$; fi",
        "touch other; exec sleep 60",
    )
    (tmp_path / "dies.sh").write_text("\n".join(script))
    command = f"bash {tmp_path}/dies.sh"
    array = cluster.train(tmp_path, ["--array=0-1"], MAML_COMMAND=command)
    elements = [f"{array}_{index}" for index in range(2)]

    def restarts() -> list[str]:
        return sorted(cluster.show(element)["Restarts"] for element in elements)

    wait_for(lambda: restarts() != ["0", "0"], "the requeueing")
    assert restarts() == ["0", "1"]
    cluster.run(tmp_path, "scancel", array)


def test_a_job_is_not_requeued_after_five_restarts(cluster: Cluster, tmp_path: Path) -> None:
    # As a job that runs out of memory every time.
    (tmp_path / "dies.sh").write_text("kill -9 $$")
    dies = f"bash {tmp_path}/dies.sh"
    job = cluster.train(tmp_path, [], MAML_COMMAND=dies, SLURM_RESTART_COUNT="5")
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "killed after 5 restarts; the job is not requeued" in log(tmp_path, job)


@pytest.mark.parametrize(
    ("flags", "key", "message"),
    [
        (["--ntasks-per-node=2"], (), "trainer.devices is 1 and trainer.num_nodes 1, but the Slurm job"),
        (TWO_NODES, ("--trainer.num_nodes", 1), "has 2 tasks on 2 nodes"),
        (["--gpus-per-node=2"], (), "this job has 2 GPUs but 1 tasks on a node; submit it with --gpus"),
    ],
)
def test_devices_that_disagree_with_the_allocation_fail_at_once(
    cluster: Cluster, tmp_path: Path, flags: list[str], key: tuple[object, ...], message: str
) -> None:
    job = cluster.train(tmp_path, flags, *TOY, *key, "--run.dir", "run")
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert message in log(tmp_path, job)
    assert "Traceback" not in log(tmp_path, job)
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_ended_does_not_requeue_the_job_of_one_that_failed(
    cluster: Cluster, tmp_path: Path
) -> None:
    # As an error that rank 1 finds first: srun then ends rank 0, which waits for rank 1 in C code and is
    # killed after all.
    script = (
        "if [ $SLURM_PROCID = 0 ]; then exec python -P -m maml_pipeline $@; fi",
        "until [ -e run/config.yaml ]; do sleep 0.1; done",
        "exit 2",
    )
    (tmp_path / "fails.sh").write_text("\n".join(script).replace("python", sys.executable))
    command = f"bash {tmp_path}/fails.sh"
    job = cluster.train(tmp_path, TWO_NODES, *TOY, "--run.dir", "run", MAML_COMMAND=command)
    end = cluster.wait(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), log(tmp_path, job)


def test_an_array_trains_a_tradeoff_and_a_job_after_it_reports(cluster: Cluster, tmp_path: Path) -> None:
    grid = (
        *TOY,
        "--trainer.max_steps",
        200,
        "--orders",
        "first,second",
        "--seeds",
        "0,1",
        "--out",
        "grid",
    )
    printed = cluster.run(tmp_path, *MAML, "submit", "--tradeoff", *grid, "--", "--cpus-per-task=1")
    array, report = re.findall(r"^Submitted (?:array|job) (\d+):", printed, re.MULTILINE)
    assert "4 cells of grid" in printed
    listed = list_runs(cluster, tmp_path, "grid")
    assert [run["job"] for run in listed] == [f"{array}_{element}" for element in (0, 2, 1, 3)]
    assert {run["state"] for run in listed} <= {"queued", "running"}
    end = cluster.wait(array, report)
    assert {run["state"] for run in list_runs(cluster, tmp_path, "grid")} == {"finished"}
    assert end["JobState"] == "COMPLETED", log(tmp_path, report)
    grid_folder = tmp_path / "grid"
    assert (grid_folder / "report" / "report.html").exists()
    summary = json.loads((grid_folder / "tradeoff.json").read_text())
    names = {f"{order}-k1-s{seed}" for order in ("first", "second") for seed in (0, 1)}
    assert {cell["folder"] for cell in summary["cells"]} == names and not summary["failed"]
    # No two elements share a folder or an id.
    jobs = {(grid_folder / name / "slurm_job.txt").read_text() for name in names}
    outputs = {element: tmp_path / f"slurm-{array}_{element}.out" for element in range(4)}
    assert jobs == {f"{array}_{element}\n{output}\n" for element, output in outputs.items()}

    # `maml tradeoff` without Slurm trains identical weights.
    local = (*grid[:-1], "local", "--orders", "second", "--seeds", "1")
    cluster.run(tmp_path, *MAML, "tradeoff", *local)
    assert_same_run(grid_folder / "second-k1-s1", tmp_path / "local" / "second-k1-s1")


def test_the_report_names_cells_that_failed(cluster: Cluster, tmp_path: Path) -> None:
    grid = (*TOY, "--trainer.max_steps", 20, "--orders", "first", "--seeds", "0,1", "--out", "grid")
    checkpoints = tmp_path / "grid" / "first-k1-s1" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").write_text("damaged")
    printed = cluster.run(tmp_path, *MAML, "submit", "--tradeoff", *grid, "--", "--cpus-per-task=1")
    array, report = re.findall(r"^Submitted (?:array|job) (\d+):", printed, re.MULTILINE)
    assert cluster.wait(array, report)["JobState"] == "FAILED"
    assert "1 of 2 cells failed (first-k1-s1)" in log(tmp_path, report)
    assert "first-k1-s1: there is no metrics.csv" in log(tmp_path, report)
    failed, _ = list_runs(cluster, tmp_path, "grid", "--sort", "state")
    assert (failed["state"], failed["job"]) == ("failed", f"{array}_1")
    assert "last.ckpt is not a checkpoint of this program" in failed["reason"]
    assert (tmp_path / "grid" / "report" / "report.html").exists()
    assert len(untimed_metrics(tmp_path / "grid" / "first-k1-s0"))


def test_the_list_of_runs_follows_a_job_from_its_submission_to_its_result(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = (*TOY, "--trainer.max_steps", LONG, "--run.checkpoint_every", 1000)
    printed = cluster.run(tmp_path, *MAML, "submit", *run, "--", "--cpus-per-task=1", "--hold")
    job = printed.partition(":")[0].split()[-1]
    assert f"Run folder: runs/toy-second-s0\nOutput: slurm-{job}.out\n" in printed
    assert state_of(cluster, tmp_path) == ("queued", job, "JobHeldUser")
    cluster.run(tmp_path, "scontrol", "release", job)
    folder = tmp_path / "runs" / "toy-second-s0"
    wait_for_meta_step(folder, 100)
    assert state_of(cluster, tmp_path) == ("running", job, None)
    # Its start is held as well, so that it stays in the queue.
    cluster.run(tmp_path, "scontrol", "requeuehold", job)
    wait_for(lambda: state_of(cluster, tmp_path)[0] != "running", "the requeueing")
    assert state_of(cluster, tmp_path)[:2] == ("requeued", job)
    cluster.run(tmp_path, "scontrol", "release", job)
    assert cluster.wait(job)["JobState"] == "COMPLETED", log(tmp_path, job)
    assert state_of(cluster, tmp_path) == ("finished", None, None)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["toy-second-s0"]
    last = log(tmp_path, job).splitlines()[-1]
    assert last.startswith("Training took ") and last.endswith("results are in runs/toy-second-s0")


def test_a_job_that_fails_before_its_run_is_listed_with_the_reason(
    cluster: Cluster, tmp_path: Path
) -> None:
    # More GPUs than tasks, which `maml submit` cannot see here.
    flags = ("--cpus-per-task=1", "--exclusive")
    printed = cluster.run(tmp_path, *MAML, "submit", *TOY, "--", *flags)
    job = printed.partition(":")[0].split()[-1]
    assert cluster.wait(job)["JobState"] == "FAILED"
    state, failed, reason = state_of(cluster, tmp_path)
    assert (state, failed) == ("failed", job)
    assert reason is not None and reason.startswith("this job has 2 GPUs but 1 tasks on a node")


def test_a_requeued_job_that_started_from_a_checkpoint_file_continues_its_own_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    first = cluster.train(tmp_path, [], *TOY, "--trainer.max_steps", 50, "--run.dir", "first")
    assert cluster.wait(first)["JobState"] == "COMPLETED", log(tmp_path, first)
    run = (*TOY, "--trainer.max_steps", LONG, "--ckpt_path", "first/checkpoints/last.ckpt")
    printed = cluster.run(tmp_path, *MAML, "submit", *run, "--", "--cpus-per-task=1")
    job = printed.partition(":")[0].split()[-1]
    folder = tmp_path / "runs" / "toy-second-s0"
    wait_for_meta_step(folder, 300)
    cluster.run(tmp_path, "scancel", "--signal=USR1", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", "the requeueing")
    assert cluster.wait(job)["JobState"] == "COMPLETED", log(tmp_path, job)
    starts = [line for line in log(tmp_path, job).splitlines() if line.startswith("Run folder: ")]
    place = "Run folder: runs/toy-second-s0, from "
    assert starts == [
        f"{place}first/checkpoints/last.ckpt",
        f"{place}runs/toy-second-s0/checkpoints/last.ckpt",
    ]
