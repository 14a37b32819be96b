"""A run's folder: its name, its lock, and no leftovers of a rejected run."""

import ast
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from torch import Tensor, nn

from maml_pipeline import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.learner import MetaLearner, TaskDataModule
from maml_pipeline.learner.tracking.description import describe_run
from maml_pipeline.runs.locked_folder import lock_run_folder, open_run_folder
from maml_pipeline.tasks import Omniglot, SineWaves, Task, TaskDistribution
from maml_pipeline.tasks.lines import Lines
from maml_pipeline.tasks.task import Split
from tests.helpers import CONFIGS, SHORT, Maml

pytestmark = pytest.mark.integration


class Parabolas(TaskDistribution):
    """User-defined tasks without a name and without `super().__init__()`."""

    def __init__(self, shots: int = 5) -> None:
        self.shots = shots

    def task(self, seed: int, split: Split, index: int) -> Task:
        return Lines(self.shots, self.shots).task(seed, split, index)


class Named(Parabolas):
    def __init__(self, shots: int = 5, name: str = "a custom name") -> None:
        super().__init__(shots)
        self.name = name


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "name"),
    [
        (Lines(), "toy"),
        (Lines(shots=3), "toy"),
        (SineWaves(), "sine-10shot"),
        (SineWaves(shots=5), "sine-5shot"),
        (Omniglot(), "omniglot-5w1s"),
        (Omniglot(ways=20, shots=5), "omniglot-20w5s"),
        (Parabolas(), "parabolas-5shot"),
        (Parabolas(shots=[1, 5]), "parabolas"),  # type: ignore[arg-type]
        (Named(), "a custom name"),
    ],
)
def test_the_name_of_tasks_includes_their_settings(tasks: TaskDistribution, name: str) -> None:
    assert tasks.name == name


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "toy-second-s0"),
        (
            ["--data.tasks", "maml_pipeline.tasks.SineWaves"],
            "sine-5shot-second-s0",
        ),  # the shots of toy.yaml
        (["--data.tasks", "SineWaves", "--data.tasks.shots", 3], "sine-3shot-second-s0"),
        (["--data.tasks", "tests.test_run_folder.Parabolas"], "parabolas-5shot-second-s0"),
        (["--run.experiment", "mine", "--seed_everything", 4], "mine-second-s4"),
        (["--model.first_order", "true"], "toy-first-s0"),
    ],
)
def test_a_run_is_named_after_its_tasks_or_run_experiment(
    arguments: list[object], name: str, maml: Maml
) -> None:
    maml("fit", *SHORT, *arguments)
    (folder,) = Path("runs").iterdir()
    assert folder.name == name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    experiment = config["run"]["experiment"]
    assert name == f"{experiment}-{'first' if config['model']['first_order'] else 'second'}-s{name[-1]}"
    assert describe_run(config, 1).group == f"{experiment}-k1"


def test_other_tasks_with_the_config_of_a_run_have_their_own_name(maml: Maml) -> None:
    maml("fit", *SHORT, "--data.tasks", "SineWaves", "--run.dir", "ten")
    maml("fit", "--config", "ten/config.yaml", "--data.tasks.shots", 4)
    assert os.listdir("runs") == ["sine-4shot-second-s0"]


def test_a_tradeoff_is_named_after_its_tasks(maml: Maml) -> None:
    tasks = ("--data.tasks", "SineWaves", "--data.tasks.shots", 3)
    printed = maml("tradeoff", "--config", CONFIGS / "toy.yaml", *tasks, "--dry_run")
    assert printed.startswith("runs/sine-3shot-tradeoff/first-k1-s0")


@pytest.mark.parametrize(
    "name", ["../../esc", "a/b", "a\\b", "..", ".", "", " ", "a\nb", "\x1b[31mred", "x" * 400, "ä" * 99]
)
def test_run_experiment_must_be_a_single_path_component(
    name: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    error = maml_error("fit", *SHORT, f"--run.experiment={name}")
    assert "run.experiment" in error and "\x1b" not in error
    assert not list(tmp_path.iterdir()) and not (tmp_path.parent / "esc").exists()


def test_the_name_of_tasks_must_be_a_single_path_component(
    maml_error: Callable[..., str], tmp_path: Path
) -> None:
    named = ("--data.tasks", "tests.test_run_folder.Named", "--data.tasks.name", "../mine")
    assert "the tasks' name is '../mine'" in maml_error("fit", *SHORT, *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ways", "outputs"), [(3, 5), (5, 3)])
def test_a_head_that_does_not_fit_the_ways_is_rejected(
    ways: int, outputs: int, maml_error: Callable[..., str], tmp_path: Path, synthetic_omniglot: Path
) -> None:
    config = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml", "--config", CONFIGS / "cpu.yaml")
    root = ("--data.tasks.root", synthetic_omniglot, "--data.tasks.cache_dir", tmp_path / "cache")
    sizes = ("--data.tasks.ways", ways, "--model.network.ways", outputs)
    error = maml_error("fit", *config, *root, *sizes)
    assert f"data.tasks.ways is {ways}" in error and f"has {outputs} outputs" in error
    assert f"--data.tasks.ways {outputs} or --model.network.ways {ways}" in error
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


class TwoOutputs(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x  # type: ignore[no-untyped-call]


def test_a_network_with_two_outputs_is_named(
    maml_error: Callable[..., str], tmp_path: Path, synthetic_omniglot: Path
) -> None:
    config = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml", "--config", CONFIGS / "cpu.yaml")
    root = ("--data.tasks.root", synthetic_omniglot, "--data.tasks.cache_dir", tmp_path / "cache")
    error = maml_error("fit", *config, *root, "--model.network", "tests.test_run_folder.TwoOutputs")
    assert "network TwoOutputs returns a tuple of 2; it must return one tensor" in error


# Numbers ----------------------------------------------------------------------------------------


def test_a_new_run_never_reuses_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [run_folder.create_numbered("run") for _ in range(3)]
    assert [folder.name for folder in made] == ["run", "run-2", "run-3"]
    for folder in made[:2]:
        (folder / "checkpoints").rmdir()
        folder.rmdir()
    for other in ("run-x", "run-2-second", "run-03", "another-run-7"):
        (tmp_path / "runs" / other).mkdir()
    assert run_folder.folders_named("run") == [Path("runs/run-3")]
    assert run_folder.create_numbered("run") == Path("runs/run-4")


# Leftovers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt(), SystemExit(3), OSError("no")])
@pytest.mark.parametrize("given", [(), ("--run.dir", "deep/er/mine")])
def test_a_run_that_ends_before_training_leaves_no_folder(
    error: BaseException,
    given: tuple[str, ...],
    maml: Maml,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        assert [*tmp_path.rglob("config.yaml")], "the folder exists by then"
        raise error

    monkeypatch.setattr(TaskDataModule, "train_dataloader", fail)
    with pytest.raises((type(error), SystemExit)):
        maml("fit", *SHORT, *given)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_keeps_its_files_after_a_rejection(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("it cannot work")

    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    maml("fit", *SHORT, "--run.dir", "trained", "--trainer.max_steps", 4)
    monkeypatch.setattr(TaskDataModule, "train_dataloader", fail)
    for name in ("empty", "full"):
        assert "it cannot work" in maml_error("fit", *SHORT, "--run.dir", name)
    maml_error("fit", *SHORT, "--run.dir", "trained", "--ckpt_path", "last")
    assert not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "trained" / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / "trained" / "metrics.csv").exists()


def test_a_trained_run_is_kept_after_an_error(
    maml: Maml, maml_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("it cannot be tested")

    monkeypatch.setattr(MetaLearner, "test_step", fail)
    assert "it cannot be tested" in maml_error("fit", *SHORT)
    assert Path("runs/toy-second-s0/checkpoints/last.ckpt").exists()


def test_an_untrained_folder_with_other_settings_is_not_reused(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    maml("fit", *SHORT, "--run.dir", "mine")
    for checkpoint in (tmp_path / "mine" / "checkpoints").iterdir():
        checkpoint.unlink()  # as after a kill before the first checkpoint
    other = ("--model.inner_lr", 0.2, "--run.dir", "mine")
    assert "model.inner_lr is 0.2 here and 0.1 there" in maml_error("fit", *SHORT, *other)
    maml("fit", *SHORT, "--run.dir", "mine")
    assert (tmp_path / "mine" / "checkpoints" / "last.ckpt").exists()


def test_a_config_that_belongs_to_no_run_is_never_overwritten(
    maml_error: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "grid").mkdir()
    text = (CONFIGS / "toy.yaml").read_text()
    (tmp_path / "grid" / "config.yaml").write_text(text)  # a trade-off's, or one that a user wrote
    error = maml_error("fit", *SHORT, "--run.dir", "grid")
    assert "run.dir: grid/config.yaml does not belong to a run and would be overwritten" in error
    assert (tmp_path / "grid" / "config.yaml").read_text() == text
    assert len(list((tmp_path / "grid").iterdir())) == 1


@pytest.mark.parametrize("name", ["test.json", "val.json", "metrics.csv", "checkpoints/best.ckpt"])
def test_a_folder_with_files_that_a_run_would_replace_is_refused(
    name: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    error = maml_error("fit", *SHORT, "--run.dir", "data")
    assert f"run.dir data is not a run's folder, but has {name}" in error
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


# The lock ---------------------------------------------------------------------------------------


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run_folder(folder, "run"):
        # Another open file stands for another process.
        with pytest.raises(UserError, match="is in use"), open_run_folder(folder, "run"):
            pass
        assert folder.exists(), "the rejected one removes nothing"
    with open_run_folder(folder, "run"):
        pass


def test_without_file_locks_the_slurm_job_decides_and_one_warning_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), lock_run_folder(tmp_path):
        pass
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} cannot be locked (Function not implemented): make sure that no other process "
        "trains in it"
    ]
    (tmp_path / "slurm_job.txt").write_text("17\n")
    with pytest.raises(UserError, match="holds a run of Slurm job 17"), lock_run_folder(tmp_path, "18"):
        pass
    with lock_run_folder(tmp_path, "17"):
        pass


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()  # root ignores permissions
    with (
        pytest.raises(UserError, match=r"cannot be written \(Is a directory"),
        open_run_folder(tmp_path, "run"),
    ):
        pass


# Home folders -----------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    maml("fit", *SHORT, "--run.dir=~/mine")
    assert (tmp_path / "home" / "mine" / "test.json").exists()
    maml("test", *SHORT, "--ckpt_path=~/mine/checkpoints/best.ckpt")
    maml("fit", *SHORT, "--run.dir=~/mine", "--ckpt_path", "last", "--trainer.max_steps", 14)
    assert not (tmp_path / "~").exists()
    error = maml_error("fit", *SHORT, "--run.dir=~nobody-of-this-name/mine")
    assert "run.dir ~nobody-of-this-name/mine begins with a home folder that does not exist" in error


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_tilde_in_data_paths_is_the_home_folder(
    by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic_omniglot: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(synthetic_omniglot)
    if by_variable:
        monkeypatch.setenv("MAML_OMNIGLOT_ROOT", "~/data")
    Omniglot(root=None if by_variable else "~/data", cache_dir="~/cache").prepare()
    assert [*(tmp_path / "home" / "cache").glob("omniglot-*.npy")]
    assert {path.name for path in tmp_path.iterdir()} == {"home"}


# File names -------------------------------------------------------------------------------------

FILE_NAMES = {
    *(run_folder.CONFIG, run_folder.METRICS, run_folder.TEST, run_folder.VALIDATION, run_folder.LOG),
    *(run_folder.LOCK, run_folder.JOB, run_folder.WANDB_ID, run_folder.TRADEOFF),
    *(run_folder.CHECKPOINTS, run_folder.BEST_CHECKPOINT, run_folder.LAST_CHECKPOINT),
}


def test_file_names_of_a_run_are_spelled_in_one_module() -> None:
    names = {Path(name).name for name in FILE_NAMES}
    package = Path(run_folder.__file__).parent
    spelled = {
        f"{file.relative_to(package)}: {node.value}"
        for file in package.rglob("*.py")
        # The cache of a data set has a lock too.
        if file not in (Path(run_folder.__file__), package / "tasks" / "image_cache.py")
        for node in ast.walk(ast.parse(file.read_text()))
        # Prose, such as an error message or an example, may mention a file; a path may not.
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value.rpartition("/")[2] in names and " " not in node.value
    }
    assert not spelled
