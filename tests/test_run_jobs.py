"""What Slurm says about a run's job, and what `maml runs` makes of it, with a stand-in for Slurm."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from maml_pipeline.errors import UserError
from maml_pipeline.locks import locked
from maml_pipeline.run_folder import record_slurm_job
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.slurm_jobs import active_jobs, jobs_of
from maml_pipeline.runs.state import RunState, Situation, situation
from maml_pipeline.slurm.queue import Job, find_jobs
from tests.helpers import Maml
from tests.written_runs import write_run

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Return a function that puts a program into the PATH, whose calls are recorded in a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        calls = tmp_path / f"{name}.txt"
        (folder / name).write_text(f'#!/bin/bash\necho "$*" >>{calls}\n{script}\n')
        (folder / name).chmod(0o755)
        return calls

    return write


# Asking Slurm -----------------------------------------------------------------------------------


@pytest.mark.integration
def test_one_call_of_squeue_and_one_of_sacct_tell_about_all_jobs(program: Program) -> None:
    squeue = program(
        "squeue",
        """cat <<END
7|PENDING|0|0|4:00:00|Resources|/home/me|/home/me/slurm-7.out|
8_1|RUNNING|2|0|1-00:00:00|None|/home/me|out/%A_%a.txt|
9|FAILED|0|512|10:00|NonZeroExitCode|/home/me|/home/me/%x.out|
END""",
    )
    sacct = program("sacct", r"printf '5|CANCELLED by 1000|0:15|10:00\n6_2|TIMEOUT|0:0|10:00\n'")
    jobs = find_jobs(["7", "8_1", "9", "5", "6_2", "4"], accounted=["7", "5", "6_2"])
    home = Path("/home/me")
    assert [*jobs.values()] == [
        Job("7", "PENDING", 0, "Resources", 0, "4:00:00", home / "slurm-7.out"),
        Job("8_1", "RUNNING", 2, "", 0, "1-00:00:00", home / "out/8_1.txt"),
        Job("9", "FAILED", 0, "NonZeroExitCode", 2, "10:00"),
        Job("5", "CANCELLED", exit_status=143, time_limit="10:00"),
        Job("6_2", "TIMEOUT", time_limit="10:00"),
    ]
    (asked,) = squeue.read_text().splitlines()
    assert asked.endswith("--jobs=4,5,6_2,7,8_1,9")
    (asked,) = sacct.read_text().splitlines()
    assert asked.endswith("--jobs=5,6_2")


@pytest.mark.integration
@pytest.mark.parametrize(
    "script", ["exit 1", "echo broken", "exec sleep 60", "printf '\\377|||||||\\n'"]
)
def test_nothing_is_known_without_an_answer(
    program: Program, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maml_pipeline.slurm.queue.SECONDS_TO_ANSWER", 0.5)
    program("squeue", script)
    program("sacct", script)
    assert not find_jobs(["7"], accounted=["7"])


@pytest.mark.integration
@pytest.mark.parametrize(
    "script", ["echo 'Unable to contact slurm controller' >&2; exit 1", "exec sleep 60"]
)
def test_no_answer_does_not_mean_that_a_job_has_ended(
    program: Program, script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("maml_pipeline.slurm.queue.SECONDS_TO_ANSWER", 0.5)
    program("squeue", script)
    record_slurm_job(tmp_path, "7")
    with pytest.raises(UserError, match=r"Slurm does not say whether job 7 of .* has ended; try again"):
        active_jobs([tmp_path])


@pytest.mark.integration
@pytest.mark.parametrize(
    "script", ["exit 0", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"]
)
def test_a_job_that_slurm_has_forgotten_has_ended(program: Program, script: str, tmp_path: Path) -> None:
    program("squeue", script)
    program("sacct", "exit 1")  # as without accounting
    record_slurm_job(tmp_path, "7")
    assert not active_jobs([tmp_path])


@pytest.mark.integration
def test_without_slurm_no_job_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    record_slurm_job(tmp_path, "7")  # a run that was copied from a cluster
    assert not active_jobs([tmp_path])


def test_slurm_is_not_asked_without_a_job(program: Program, tmp_path: Path) -> None:
    squeue = program("squeue", "exit 0")
    write_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "slurm_job.txt").write_bytes(b"not an id; \xff\n")
    (tmp_path / "c" / "slurm_job.txt").mkdir(parents=True)
    assert not jobs_of([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert not squeue.exists()


# The state of a run -----------------------------------------------------------------------------

PENDING = Job("7", "PENDING", reason="Resources")
REQUEUED = Job("7", "PENDING", restarts=1, reason="BeginTime")
RUNNING = Job("7", "RUNNING")


@pytest.mark.parametrize(
    ("done", "job", "found"),
    [
        (0, PENDING, Situation(RunState.QUEUED, "7", "Resources")),
        (40, PENDING, Situation(RunState.QUEUED, "7", "Resources")),
        (40, REQUEUED, Situation(RunState.REQUEUED, "7", "BeginTime")),
        (0, RUNNING, Situation(RunState.RUNNING, "7")),
        (40, Job("7", "COMPLETING"), Situation(RunState.RUNNING, "7")),
        (40, None, Situation(RunState.STOPPED)),
        (40, Job("7", "COMPLETED"), Situation(RunState.STOPPED, "7")),
        (40, Job("7", "TIMEOUT"), Situation(RunState.STOPPED, "7", "timeout")),
        (40, Job("7", "CANCELLED"), Situation(RunState.STOPPED, "7", "cancelled")),
        (40, Job("7", "OUT_OF_MEMORY"), Situation(RunState.FAILED, "7", "out of memory")),
        (0, Job("7", "FAILED", exit_status=2), Situation(RunState.FAILED, "7", "exit status 2")),
    ],
)
def test_the_state_of_an_unfinished_run_is_that_of_its_job(
    tmp_path: Path, done: int, job: Job | None, found: Situation
) -> None:
    folder = write_run(tmp_path / "a", result=None, done=done)
    (run,) = find_runs([folder], unlogged=True).runs
    assert situation(run, job) == found


@pytest.mark.parametrize(
    ("job", "found"),
    [
        (REQUEUED, Situation(RunState.FINISHED)),  # the job has a later run
        (RUNNING, Situation(RunState.FINISHED)),
        (PENDING, Situation(RunState.QUEUED, "7", "Resources")),  # to be trained longer
    ],
)
def test_a_finished_run_stays_finished_until_a_new_job_waits_to_resume_it(
    tmp_path: Path, job: Job, found: Situation
) -> None:
    (run,) = find_runs([write_run(tmp_path / "a")]).runs
    assert situation(run, job) == found


def test_a_locked_folder_is_running_whatever_slurm_says(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", result=None, done=50)
    (run,) = find_runs([folder]).runs
    with locked(folder / ".lock"):
        assert situation(run, Job("7", "FAILED")) == Situation(RunState.RUNNING)
        assert situation(run, RUNNING) == Situation(RunState.RUNNING, "7")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("slurm: error: this job has 2 GPUs\nsrun: ended\n", "this job has 2 GPUs"),
        ("Traceback (most recent call last):\n  File ...\nKeyError: 1\nsrun: ended\n", "KeyError: 1"),
        ("maml: error: old\nRun folder: a\nmaml: error: new\n", "new"),
    ],
)
def test_the_reason_of_a_failure_is_in_the_output_of_the_job(
    tmp_path: Path, output: str, reason: str
) -> None:
    folder = write_run(tmp_path / "a", result=None, done=0)
    log = tmp_path / "slurm-7.out"
    log.write_text(output)
    record_slurm_job(folder, "7", log)
    (run,) = find_runs([folder], unlogged=True).runs
    # Also when Slurm has forgotten the job.
    assert situation(run) == Situation(RunState.FAILED, None, reason)
    assert situation(run, Job("7", "FAILED")) == Situation(RunState.FAILED, "7", reason)


@pytest.mark.integration
def test_the_list_names_jobs_and_reasons(program: Program, tmp_path: Path, maml: Maml) -> None:
    line = "7|PENDING|0|0|4:00:00|Resources|/|/slurm-7.out|"
    program("squeue", f"echo '{line}'")
    record_slurm_job(write_run(tmp_path / "runs" / "a", result=None, done=0), "7")
    write_run(tmp_path / "runs" / "b")
    assert maml("runs").splitlines()[-1] == "runs/a is queued (Slurm job 7): Resources"
    (queued,) = json.loads(maml("runs", "--json", "--filter", "state=queued"))
    assert (queued["job"], queued["reason"]) == ("7", "Resources")


def test_a_run_that_is_resumed_outside_slurm_forgets_its_job(tmp_path: Path) -> None:
    record_slurm_job(tmp_path, "7", tmp_path / "slurm-7.out")
    before = (tmp_path / "slurm_job.txt").read_text()
    record_slurm_job(tmp_path, "7")  # as the job does when it starts
    assert (tmp_path / "slurm_job.txt").read_text() == before
    record_slurm_job(tmp_path, "8")
    assert (tmp_path / "slurm_job.txt").read_text() == "8\n"
    record_slurm_job(tmp_path, None)
    assert not [*tmp_path.iterdir()]
