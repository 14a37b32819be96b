"""A full, read-only, broken or missing disk is a short error and loses no saved state."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer

from maml_pipeline.files import remove_unfinished, write_atomically
from tests.helpers import CONFIGS, Maml, assert_same_run, run_python

pytestmark = pytest.mark.integration

FIT = (
    *("fit", "--config", CONFIGS / "toy.yaml", "--run.dir", "run"),
    *("--trainer.max_steps", 30, "--trainer.val_check_interval", 10, "--run.checkpoint_every", 10),
    *("--data.val_tasks", 4, "--data.test_tasks", 4, "--trainer.enable_progress_bar", "false"),
    *("--probes.memory", "false", "--probes.speed", "false"),
)
NUMBERS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EIO", "ESTALE", "EFBIG")


def fail_when_writing(patch: pytest.MonkeyPatch, name: str, number: int, after: int = 0) -> None:
    """Let `fsync` of a file fail after `after` successful calls."""
    original, left = os.fsync, [after]

    def fsync(descriptor: int) -> None:
        if name in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
        original(descriptor)

    patch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "whole")
    fail_when_writing(monkeypatch, "file", getattr(errno, number))
    with pytest.raises(OSError, match="file") as failure:
        write_atomically(path, "new")
    assert (failure.value.errno, failure.value.filename) == (getattr(errno, number), str(path))
    assert path.read_text() == "whole" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("file", ["config.yaml", "last.ckpt", "best.ckpt", "metrics.csv", "test.json"])
@pytest.mark.parametrize("number", ["ENOSPC", "EROFS"])
def test_a_run_whose_disk_fails_ends_in_two_lines_and_resumes_exactly(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path, file: str, number: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Files that are written repeatedly fail the second time.
        again = file in ("last.ckpt", "metrics.csv")
        fail_when_writing(patch, file, getattr(errno, number), after=int(again))
        error = maml_error(*FIT)
    assert f"{file}: {os.strerror(getattr(errno, number))}; " in error
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.exists() == ("The last checkpoint, run/checkpoints/last.ckpt, is intact" in error)
    assert not [*(tmp_path / "run").rglob(".*unfinished")]
    if last.exists():
        torch.load(last, weights_only=True)
    maml(*FIT, *(["--ckpt_path", "last"] if last.exists() else []))
    maml(*FIT, "--run.dir", "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


class DeleteFolder(Callback):
    """Deletes the run's folder at the twelfth meta-step."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 11:
            shutil.rmtree(trainer.default_root_dir)


def test_a_deleted_run_folder_is_a_one_line_error_and_is_not_recreated(
    maml_error: Callable[..., str], tmp_path: Path
) -> None:
    error = maml_error(*FIT, "--trainer.callbacks", "tests.test_disk_errors.DeleteFolder")
    assert "run/" in error and "No such file or directory; it was deleted while" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_other_commands_name_the_file_that_cannot_be_written(
    maml: Maml, maml_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maml(*FIT)
    graph = ("derive", "--graph", "graph.dot")
    grid = ("tradeoff", *FIT[1:3], "--orders", "first", "--out", "grid")
    for arguments, file, named in (
        (("report", "run"), "report/overview.png", "out report"),
        (grid, "grid/config.yaml", "grid/config.yaml"),
        (graph, "graph.dot", "graph.dot"),
    ):
        with monkeypatch.context() as patch:
            fail_when_writing(patch, Path(file).name, errno.ENOSPC)
            error = maml_error(*arguments)
        assert named in error and "No space left on device" in error


def test_an_error_that_may_be_a_bug_keeps_its_traceback(
    maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (OSError(errno.ENOSPC, "no file is named"), OSError(errno.EINVAL, "unknown", "file")):

        def fail(*args: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("maml_pipeline.derivation.derive.derive", fail)
        with pytest.raises(OSError, match=r"no file is named|unknown"):
            maml("derive")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_line_or_none() -> None:
    script = """
import sys, types
from maml_pipeline import cli
# A command that imports nothing slow.
module = types.ModuleType("maml_pipeline.cli.derive")
module.run = lambda arguments: print("result\\n" * 100_000)
sys.modules[module.__name__] = module
cli.main(["derive"])
"""
    with Path("/dev/full").open("w") as full:
        ended = run_python(script, stdout=full)
    assert ended.returncode == 1
    assert ended.stderr == "maml: error: standard output: No space left on device; free some space\n"

    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = run_python(script, stdout=write_end)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / ".test.json.0a1b2c3d.unfinished", tmp_path / "checkpoints" / ".x.unfinished"]
    others = [tmp_path / "test.json", tmp_path / ".lock", tmp_path / "checkpoints" / "last.ckpt"]
    for path in (*left, *others):
        path.touch()
    remove_unfinished(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
