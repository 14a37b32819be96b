"""`maml submit` requests what the config needs; `maml prepare` prepares the data."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maml_pipeline.cli import submit
from maml_pipeline.environment import OFFLINE
from maml_pipeline.errors import UserError
from maml_pipeline.run_folder import record_slurm_job
from maml_pipeline.slurm.queue import Job
from maml_pipeline.tasks.omniglot_images import load_images
from tests.helpers import (
    CONFIGS,
    SHORT,
    SHORT_NAME,
    Maml,
    maml_process,
    read_config,
    run_python,
)
from tests.written_runs import write_search

pytestmark = pytest.mark.integration

TOY = ("--config", CONFIGS / "toy.yaml")
SINE = ("--config", CONFIGS / "sine.yaml")
SLURM = CONFIGS.parent / "slurm"


@pytest.fixture(autouse=True)
def config_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Be a user of a login node without settings of the cluster, and return the user's config folder."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    for name in ("MAML_GPUS_PER_NODE", "MAML_GPU_TYPE", "MAML_CLUSTER_ENV"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an `sbatch` on the PATH that records its arguments in a file, and counts jobs from 7."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = tmp_path / "calls.txt"
    program = folder / "sbatch"
    program.write_text(
        textwrap.dedent(f"""\
            #!/bin/bash
            echo "$*" >>{calls}
            [ ! -e {tmp_path}/broken ] || {{ echo "sbatch: error: no" >&2; exit 1; }}
            echo $((6 + $(wc -l <{calls})))
        """)
    )
    queue = folder / "squeue"
    queue.write_text(
        textwrap.dedent(f"""\
            #!/bin/bash
            [ ! -e {tmp_path}/busy ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
            [ -e {tmp_path}/queue.txt ] || {{ echo "Invalid job id specified" >&2; exit 1; }}
            cat {tmp_path}/queue.txt
        """)
    )
    for each in (program, queue):
        each.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


def queued(tmp_path: Path, job: str, state: str = "PENDING") -> str:
    """Make squeue know one more job, and return the path of its output file."""
    output = tmp_path / f"slurm-{job}.out"
    with (tmp_path / "queue.txt").open("a") as queue:
        queue.write(f"{job}|{state}|0|0|4:00:00|Resources|{tmp_path}|{output}|\n")
    return str(output)


def commands(dry_run: str) -> list[list[str]]:
    return [shlex.split(line) for line in dry_run.splitlines() if line.startswith("sbatch ")]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (TOY, ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"]),
        ((*TOY, "--trainer.devices", 2), ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0"]),
        (
            (*SINE, "--trainer.devices", 4, "--trainer.num_nodes", 2, "--data.meta_batch_size", 24),
            ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"],
        ),
        (
            (*SINE, "--trainer.devices", "[0,1,3]", "--data.meta_batch_size", 24),
            ["--nodes=1", "--ntasks-per-node=3", "--gpus-per-node=3"],
        ),
        (SINE, ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]),
    ],
)
def test_a_job_requests_the_nodes_and_devices_of_its_config(
    maml: Maml, arguments: tuple[object, ...], asked: list[str]
) -> None:
    ((_, *command),) = commands(maml("submit", "--dry_run", *arguments))
    assert command[:3] == asked
    at = command.index(str(SLURM / "train.sbatch"))
    assert command[at + 1 :][: len(arguments)] == [str(argument) for argument in arguments]
    # Open settings are resolved at submission, so that the job cannot resolve them differently.
    if arguments == SINE:
        assert command[at + 3 :] == ["--trainer.devices", "1", "--trainer.accelerator", "gpu"]


def test_all_gpus_of_a_node_are_requested(maml: Maml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_GPUS_PER_NODE", "8")
    monkeypatch.setenv("MAML_GPU_TYPE", "h100")
    overlay = ("--config", CONFIGS / "multi_gpu.yaml")
    ((_, *command),) = commands(
        maml("submit", "--dry_run", *SINE, *overlay, "--data.meta_batch_size", 24)
    )
    assert command[1:3] == ["--ntasks-per-node=8", "--gpus-per-node=h100:8"]
    assert command[-2:] == ["--trainer.devices", "8"]


def test_a_dry_run_prints_the_script_and_touches_nothing(maml: Maml, tmp_path: Path) -> None:
    printed = maml("submit", "--tradeoff", "--dry_run", *TOY, "--seeds", "0,1")
    assert (SLURM / "tradeoff.sbatch").read_text() in printed
    array, report = commands(printed)
    assert "--array=0,1,2,3,4,5" in array and "--dependency=afterany:ARRAY" in report
    assert not [*tmp_path.iterdir()]


def test_a_job_is_submitted_with_the_flags_after_the_dashes(maml: Maml, sbatch: Path) -> None:
    printed = maml("submit", *TOY, "--", "--partition", "p", "--time=1:00:00")
    assert printed.startswith("Submitted job 7: toy-second-s0 on 1 CPU process")
    (call,) = sbatch.read_text().splitlines()
    assert call.startswith("--parsable --nodes=1 ")
    assert f"--partition p --time=1:00:00 {SLURM / 'train.sbatch'} --config" in call


def test_the_message_names_the_run_its_output_and_what_to_type_next(
    maml: Maml, sbatch: Path, tmp_path: Path
) -> None:
    output = queued(tmp_path, "7")
    assert maml("submit", *TOY).splitlines() == [
        "Submitted job 7: toy-second-s0 on 1 CPU process, for at most 4:00:00",
        "Run folder: runs/toy-second-s0",
        "Output: slurm-7.out",
        "Meanwhile: maml runs",
        "           tail -F slurm-7.out",
        "           scancel 7",
        "When it has ended: maml report runs/toy-second-s0",
    ]
    assert (tmp_path / "runs/toy-second-s0/slurm_job.txt").read_text() == f"7\n{output}\n"


def test_a_job_trains_in_the_folder_and_with_the_settings_of_its_submission(
    maml: Maml, sbatch: Path, tmp_path: Path
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text((CONFIGS / "toy.yaml").read_text())
    for name in ("toy-second-s0", "toy-second-s0-2"):
        assert f"Run folder: runs/{name}\n" in maml("submit", "--config", config, *SHORT[2:])
    config.write_text("edited: while the jobs wait")
    first, second = (call.split("train.sbatch ")[1].split() for call in sbatch.read_text().splitlines())
    for job_arguments, name in ((second, "toy-second-s0-2"), (first, "toy-second-s0")):
        assert f"Run folder: runs/{name}\n" in maml("fit", *job_arguments)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"toy-second-s0", "toy-second-s0-2"}


@pytest.mark.parametrize(
    "arguments",
    [TOY, (*TOY, "--run.dir", "new/run"), ("--tradeoff", *TOY), ("--tradeoff", *TOY, "--out", "a/b")],
)
def test_a_failed_submission_leaves_nothing_behind(
    maml_error: Maml, sbatch: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    (tmp_path / "broken").touch()
    before = {*tmp_path.iterdir()}
    assert "sbatch: error: no" in maml_error("submit", *arguments)
    assert {*tmp_path.iterdir()} == before | {sbatch}


def test_no_second_job_is_submitted_to_the_folder_of_a_waiting_one(
    maml: Maml, maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    queued(tmp_path, "7")
    assert "Meanwhile: maml runs run\n" in maml("submit", *TOY, "--run.dir", "run")
    submitted = sbatch.read_text()
    refused = maml_error("submit", *TOY, "--run.dir", "run")
    assert "Slurm job 7 waits to train in run; cancel it with `scancel 7`, or name another" in refused
    assert sbatch.read_text() == submitted


RUN_A = (*SHORT, "--run.dir", "runs/a")
GRID = ("submit", "--tradeoff", *TOY, "--orders", "first", "--out", "runs")


@pytest.mark.parametrize(
    ("before", "again"),
    [
        (("submit", *RUN_A), ("submit", *RUN_A)),
        (GRID, GRID),
        (("fit", *RUN_A), ("fit", *RUN_A, "--ckpt_path", "last")),
        (("fit", *RUN_A), ("submit", *RUN_A, "--ckpt_path", "last")),
        (("fit", *RUN_A), ("submit", *RUN_A, "--ckpt_path", "last", "--", "--dependency=singleton")),
    ],
)
def test_nothing_is_submitted_or_trained_unless_slurm_says_whether_a_job_has_ended(
    maml: Maml,
    maml_error: Maml,
    sbatch: Path,
    tmp_path: Path,
    before: tuple[object, ...],
    again: tuple[object, ...],
) -> None:
    maml(*before)
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    record_slurm_job(folder, "7")
    (tmp_path / "busy").touch()
    submitted = sbatch.exists() and sbatch.read_text()
    assert f"Slurm does not say whether job 7 of runs/{folder.name} has ended" in maml_error(*again)
    assert (sbatch.exists() and sbatch.read_text()) == submitted
    assert f"runs/{folder.name}" in maml("runs")


def test_the_run_of_a_job_is_not_trained_by_hand_before_the_job_has_ended(
    maml: Maml, maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    named = (*SHORT, "--run.dir", "run")
    maml("submit", *named)
    reserved = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    queued(tmp_path, "7")
    refused = maml_error("fit", *named)
    assert "Slurm job 7 waits to train in run; cancel it with `scancel 7`, or name another" in refused
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == reserved
    (tmp_path / "queue.txt").unlink()  # cancelled, and forgotten by Slurm
    maml("fit", *named)
    queued(tmp_path, "7", "RUNNING")
    (tmp_path / "run" / "slurm_job.txt").write_text("7\n")
    resumed = maml_error("fit", *named, "--ckpt_path", "last", "--trainer.max_steps", 20)
    assert "Slurm job 7 is training in run; cancel it with `scancel 7`, or wait for it" in resumed


def test_interrupting_a_submission_after_sbatch_keeps_what_the_job_reads(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(job: str) -> Job:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "find_submitted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        submit.run([*map(str, TOY)])
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "config.yaml").exists() and (folder / "slurm_job.txt").read_text() == "7\n"


def test_a_run_can_be_resumed_after_the_job_that_trains_it(
    maml: Maml, maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    maml("fit", *SHORT)
    record = tmp_path / "runs" / SHORT_NAME / "slurm_job.txt"
    record.write_text("3\n")
    queued(tmp_path, "3", "RUNNING")
    resumed = ("submit", *SHORT, "--ckpt_path", "last", "--trainer.max_steps", 20)
    assert "add -- --dependency=afterany:3" in maml_error(*resumed)
    assert f"Run folder: runs/{SHORT_NAME}\n" in maml(*resumed, "--", "--dependency=afterany:3")
    assert record.read_text() == "3\n"  # job 3 still finds its run if it is requeued
    (tmp_path / "queue.txt").unlink()
    maml(*resumed)
    assert record.read_text() == "8\n"
    (*_, call) = sbatch.read_text().splitlines()
    assert call.endswith(f"--ckpt_path last --trainer.max_steps 20 --run.dir runs/{SHORT_NAME}")


def test_a_submission_says_at_once_what_it_does(sbatch: Path, tmp_path: Path) -> None:
    script = """
    import sys
    from maml_pipeline.cli import main

    class Terminal:
        def write(self, text):
            print(text, "torch is imported:", "torch" in sys.modules)
            raise SystemExit

        def flush(self):
            pass

    sys.stderr = Terminal()
    main(["submit", "--config", "toy"])
    """
    done = run_python(script, cwd=tmp_path)
    assert done.stdout == "Checking the settings of toy ... torch is imported: False\n"


def test_a_tradeoff_is_an_array_of_its_unfinished_cells_and_a_report(
    maml: Maml, sbatch: Path, tmp_path: Path
) -> None:
    finished = tmp_path / "grid" / "second-k1-s0"
    finished.mkdir(parents=True)
    (finished / "test.json").write_text("{}")
    grid = ("--orders", "first,second", "--seeds", "0,1", "--out", "grid")
    printed = maml("submit", "--tradeoff", *TOY, *grid, "--", "--account=a")
    assert re.findall(r"array (\d+): (\d) cells|job (\d+)", printed) == [("7", "3", ""), ("", "", "8")]
    assert "  7_2 grid/first-k1-s1/log.txt\n" in printed and "scancel 7 8\n" in printed
    array, report = sbatch.read_text().splitlines()
    assert "--array=0,2,3 " in array and "--account=a" in array
    assert "--dependency=afterany:7 " in report and "--array" not in report and "--account=a" in report
    assert (tmp_path / "grid" / "config.yaml").exists()
    assert (tmp_path / "grid" / "first-k1-s1" / "slurm_job.txt").read_text() == "7_2\n"


def test_a_cell_that_waits_has_its_config_also_below_a_key_that_is_null(
    maml: Maml, sbatch: Path, tmp_path: Path
) -> None:
    vary = ("--vary", "model.learned_inner_lr.lr=0.001,0.01")
    maml("submit", "--tradeoff", *TOY, "--orders", "first", *vary, "--out", "grid")
    for rate in (0.001, 0.01):
        config = read_config(tmp_path / "grid" / f"first-k1-learned_inner_lr.lr={rate}-s0")
        assert config["model"]["learned_inner_lr"] == {"lr": rate}


def test_no_job_is_submitted_unless_every_cell_has_its_folder(
    maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "first-k1-s1").write_text("not a folder")
    grid = ("--orders", "first", "--seeds", "0,1", "--out", "grid")
    assert "first-k1-s1 is a file" in maml_error("submit", "--tradeoff", *TOY, *grid)
    assert not sbatch.exists()
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["first-k1-s1"]


def job_arguments(calls: Path) -> list[str]:
    """Return the arguments of `maml tradeoff` that both jobs of a trade-off get."""
    lines = calls.read_text().splitlines()
    array, report = (line.split("tradeoff.sbatch ")[1].split() for line in lines)
    assert array == report
    return array


def test_cells_are_trained_as_they_were_submitted(maml: Maml, sbatch: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text((CONFIGS / "toy.yaml").read_text())
    # AdamW decays weights by default, Adam of the config does not.
    vary = ("--vary", "model.optimizer=torch.optim.AdamW")
    grid = ("--config", config, *SHORT[2:], "--orders", "first", *vary, "--seeds", "3", "--out", "grid")
    maml("submit", "--tradeoff", *grid)
    config.write_text("edited: while the jobs wait")
    cell = ("tradeoff", "--trainer.devices", 1, *job_arguments(sbatch), "--cell", 0)
    trained = maml_process(*cell, WANDB_MODE="disabled")
    assert trained.returncode == 0, trained.stderr
    (folder,) = (path for path in (tmp_path / "grid").iterdir() if path.name.startswith("first"))
    settings = read_config(folder)
    assert settings["model"]["optimizer"]["init_args"]["weight_decay"] == 0.01
    assert settings["trainer"]["max_steps"] == 12 and settings["seed_everything"] == 3
    maml("tradeoff", *job_arguments(sbatch), "--trainer.devices", 1, "--report")
    assert (tmp_path / "grid" / "report" / "report.html").exists()


def test_the_values_of_a_search_are_chosen_at_the_submission(
    maml: Maml, maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    validations = {"first": {0.05: 0.1, 0.2: 0.9}, "second": {0.05: 0.9, 0.2: 0.1}}
    write_search(tmp_path / "search", validations, 3)
    printed = maml("submit", "--tradeoff", *TOY, "--best_of", "search", "--out", "grid")
    assert "first, k = 3: inner_lr 0.05; second, k = 3: inner_lr 0.2" in printed
    (tmp_path / "search").rename(tmp_path / "moved")
    reported = maml_error("tradeoff", *job_arguments(sbatch), "--report")
    assert "(first-k3-inner_lr=0.05-s0, second-k3-inner_lr=0.2-s0)" in reported


def test_cells_that_wait_or_run_are_not_submitted_again(
    maml: Maml, maml_error: Maml, sbatch: Path, tmp_path: Path
) -> None:
    grid = ("submit", "--tradeoff", *TOY, "--orders", "first,second", "--out", "grid", "--seeds")
    for element in ("7_0", "7_1"):
        queued(tmp_path, element)
    maml(*grid, "0")
    refused = maml_error(*grid, "0")
    assert "every unfinished cell of grid waits or runs already, in Slurm job 7" in refused
    maml(*grid, "0,1")
    _, _, array, report = sbatch.read_text().splitlines()
    assert "--array=2,3 " in array and "--dependency=afterany:9:7 " in report


def test_the_users_settings_of_the_cluster_have_precedence_over_those_of_the_package(
    maml: Maml, maml_error: Maml, config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings_and_gpus() -> tuple[str, str]:
        printed = maml("submit", "--dry_run", *SINE)
        file = re.findall(r"^source (.*)$", printed, re.M)[0]
        assert f"export MAML_CLUSTER_ENV={file}\n" in printed
        return file, commands(printed)[0][3]

    assert settings_and_gpus() == (str(SLURM / "cluster.env"), "--gpus-per-node=1")
    (config_home / "maml_pipeline").mkdir()
    users = config_home / "maml_pipeline" / "cluster.env"
    users.write_text("export MAML_GPUS_PER_NODE=1 MAML_GPU_TYPE=a100\n")
    assert settings_and_gpus() == (str(users), "--gpus-per-node=a100:1")
    named = tmp_path / "h100.env"
    named.write_text("echo Loading modules\nMAML_GPU_TYPE=h100\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAML_CLUSTER_ENV", "h100.env")
    assert settings_and_gpus() == (str(named), "--gpus-per-node=h100:1")
    named.unlink()
    assert "MAML_CLUSTER_ENV is h100.env, which is not a file" in maml_error(
        "submit", "--dry_run", *SINE
    )


JOB = """
srun() { while [ "$1" != bash ]; do shift; done; "$@"; }
scontrol() { [ "$1 $2" != "show hostnames" ] && echo "NodeAddr=127.0.0.1 " || echo n1; }
export -f srun scontrol
"""


def run_job(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run lines of a shell script in the environment of a job, with stand-ins for Slurm's commands."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "SLURM_PROCID": "0",
    }
    script = "\n".join([JOB, *lines])
    return subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)


def test_a_job_runs_the_maml_that_submitted_it(maml: Maml, tmp_path: Path) -> None:
    """Run the printed commands by hand, in a folder with another package of that name."""
    printed = maml("submit", "--dry_run", *TOY).splitlines()
    exports = [line for line in printed if line.startswith("export ")]
    assert f"export MAML_PYTHON={shlex.quote(sys.executable)}" in exports
    (tmp_path / "maml_pipeline").mkdir()
    (tmp_path / "maml_pipeline" / "__main__.py").write_text("raise SystemExit('the wrong package')")
    (tmp_path / "maml_pipeline" / "__init__.py").touch()
    done = run_job(tmp_path, *exports, f"bash {SLURM / 'train.sbatch'} --help")
    assert done.returncode == 0, done.stderr
    assert "maml fit" in done.stdout


@pytest.mark.parametrize(
    "line", ['[ -n "${NOT_SET:-}" ] && export X=1', 'export X="$NOT_SET/bin"', "false | true", "false"]
)
def test_a_job_accepts_the_settings_of_the_cluster_that_its_submission_accepts(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    cluster_env = tmp_path / "cluster.env"
    cluster_env.write_text(f"export MAML_COMMAND='echo trains'\n{line}\n")
    monkeypatch.setenv("MAML_CLUSTER_ENV", str(cluster_env))
    exports = re.findall("^export .*$", maml("submit", "--dry_run", *TOY), re.MULTILINE)
    job = (*exports, f"bash {SLURM / 'train.sbatch'} --config toy")
    done = run_job(tmp_path, *job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trains fit ")
    cluster_env.unlink()
    done = run_job(tmp_path, *job)
    assert done.returncode == 2 and f"this node cannot read {cluster_env}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TOY, "--model.inner_lrr", 1), "model.inner_lr"),
        ((*TOY, "--model.inner_steps", -1), "inner_steps is -1"),
        ((*TOY, "--trainer.devices", "0"), "trainer.devices is 0; give the number of devices per node"),
        ((*TOY, "--trainer.accelerator", "tpu"), "trainer.accelerator is tpu; a job takes cpu or gpu"),
        ((*TOY, "--", "--nodes=2"), "--nodes follows from trainer.num_nodes"),
        ((*TOY, "--", "-N2"), "-N follows from trainer.num_nodes"),
        ((*TOY, "--", "--gpus-per-node", "4"), "--gpus-per-node follows from trainer.devices"),
        ((*TOY, "--", "--gres=gpu:4"), "--gres follows from trainer.devices"),
        ((*TOY, "--", "partition"), "partition comes after --"),
        ((*TOY, "--", "--array=0-3"), "--array is set by `maml submit --tradeoff`"),
        (("--tradeoff", *TOY, "--cell", 1), "--cell is set by `maml submit` for each job"),
        (("--tradeoff", *TOY, "--seeds", "x"), "seeds: 'x' must be a whole number"),
    ],
)
def test_an_invalid_job_is_not_submitted(
    maml_error: Maml, sbatch: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert message in maml_error("submit", *arguments)
    assert not sbatch.exists()


def test_without_slurm_nothing_is_submitted(
    maml_error: Maml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch was not found" in maml_error("submit", *TOY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cell", 6), "cell is 6; the cells of this trade-off are 0 to 2"),
        (("--report",), "holds no trade-off; train its cells first"),
        (("--cell", 0, "--report"), "not allowed with argument"),
    ],
)
def test_an_invalid_cell_or_report_is_rejected(
    maml_error: Maml, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert message in maml_error("tradeoff", *TOY, *arguments)
    assert not [*tmp_path.iterdir()]


@pytest.mark.integration
def test_the_job_scripts_parse() -> None:
    for script in [*SLURM.iterdir(), CONFIGS.parent / "scripts" / "local_slurm.sh"]:
        if script.suffix != ".md":
            subprocess.run(["bash", "-n", str(script)], check=True)


def test_prepare_prints_the_paths_of_data_and_cache(
    maml: Maml, synthetic_omniglot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = maml(
        "prepare", "omniglot", "--root", synthetic_omniglot, "--cache_dir", tmp_path / "cache"
    )
    (cache,) = (tmp_path / "cache").glob("*.npy")
    assert printed.splitlines() == [
        f"Data:    {synthetic_omniglot.resolve()}",
        f"Cache:   {cache}",
        "Images:  32,460 of 1 x 28 x 28",
        "Classes: 1100 train, 100 val, 423 test",
    ]
    # A job can now load them offline.
    monkeypatch.setenv(OFFLINE.name, "1")
    load_images(synthetic_omniglot, tmp_path / "cache")


def test_a_job_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFLINE.name, "1")
    with pytest.raises(UserError, match="run `maml prepare omniglot` first"):
        load_images(tmp_path / "empty")
