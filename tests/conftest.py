"""Fixtures shared by several test files."""

import signal
import sys
import zipfile
from collections.abc import Generator, Iterator
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maml_pipeline.cli import main
from maml_pipeline.environment import OFFLINE, OMNIGLOT_ROOT, RUN_DIR
from maml_pipeline.tasks.omniglot_download import HALVES, find_halves
from maml_pipeline.tasks.omniglot_images import DRAWINGS, load_images
from tests.helpers import CONFIGS, Maml
from tests.wandb_stand_in import StandIn, stand_in

# The numbers of characters in Lake's two halves.
HALF_SIZES = {"images_background": 964, "images_evaluation": 659}
# Markers of tests that the default set leaves out.
LEFT_OUT = ("integration", "exhaustive", "slow", "slurm", "gpu", "browser")
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")

_started: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _started is None or event not in STARTS:
        return
    call = f"{event}{arguments[:2]}"
    # A run asks Git for its commit, and jsonargparse's typeshed_client asks Python for its path.
    if arguments[:1] != ("git",) and "json.dumps(sys.path)" not in call:
        _started.append(call)


sys.addaudithook(_watch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test of the default set that starts a process."""
    global _started
    if any(item.get_closest_marker(marker) for marker in LEFT_OUT):
        return (yield)
    _started = []
    try:
        result = yield
        assert not _started, f"starts processes, so mark it integration: {_started}"
        return result
    finally:
        _started = None


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test offline, on one thread and with a fixed random state."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv(OFFLINE.name, raising=False)  # which a run in a Slurm job sets
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _signals() -> None:
    """Restore signals that `nohup` or a shell's background job ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def unset_run_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the run folder that an earlier command has passed on to its child processes."""
    monkeypatch.setenv(RUN_DIR.name, "")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let W&B write its logs without uploading them."""
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def server() -> Iterator[StandIn]:
    """Return a fake W&B server."""
    with stand_in() as server:
        yield server


@pytest.fixture
def maml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Maml:
    """Return a function that runs the command in an empty folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def maml_error(maml: Maml, capsys: pytest.CaptureFixture[str]) -> Maml:
    """Return a function that runs the command, expects a user error and returns its message."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as failure:
            maml(*arguments)
        status = failure.value.code
        assert status not in (0, None)
        # `sys.exit` with a text prints it when the process ends; a parser prints before it exits.
        message = status if isinstance(status, str) else capsys.readouterr().err.strip()
        assert len(message.splitlines()) <= 2, message
        return message

    return run


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with finished runs of two experiments, with W&B's offline logs.

    Every method with one and two inner steps and two seeds, and one run of a second experiment.
    """
    folder = tmp_path_factory.mktemp("trained_runs")
    short = [
        *("--config", str(CONFIGS / "toy.yaml"), "--trainer.enable_progress_bar", "false"),
        *("--trainer.max_steps", "30", "--trainer.val_check_interval", "10"),
        *("--data.val_tasks", "20", "--data.test_tasks", "20", "--probes.every", "10"),
    ]
    orders: dict[str, list[str]] = {
        "first": ["--model.first_order", "true"],
        "second": [],
        "checkpointed": ["--model.method", "checkpointed"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for (order, settings), k, seed in product(orders.items(), (1, 2), (0, 1)):
            run = ["--run.dir", str(folder / "lines" / f"{order}-k{k}-s{seed}"), *settings]
            main(["fit", *short, *run, "--model.inner_steps", str(k), "--seed_everything", str(seed)])
        other = ["--run.dir", str(folder / "other" / "alone"), "--run.experiment", "other"]
        main(["fit", *short, *other])
    return folder


@pytest.fixture(scope="session")
def real_omniglot() -> Path:
    """Return the folder with the real Omniglot, or skip."""
    root = OMNIGLOT_ROOT.get()
    if find_halves(root) is None:
        pytest.skip(f"no Omniglot in {root}; name its folder in {OMNIGLOT_ROOT.name}")
    return root.resolve()


@pytest.fixture(scope="session")
def synthetic_omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two zips shaped like Omniglot, filled with random strokes."""
    root = tmp_path_factory.mktemp("synthetic_omniglot")
    random = np.random.default_rng(0)
    pngs = []
    for _ in range(DRAWINGS):
        buffer = BytesIO()
        Image.fromarray(random.random((105, 105)) > 0.1).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    for half in HALVES:
        with zipfile.ZipFile(root / f"{half}.zip", "w") as archive:
            for character in range(HALF_SIZES[half]):
                for drawing, png in enumerate(pngs):
                    folder = f"{half}/Alphabet{character // 50:02}/character{character % 50:02}"
                    archive.writestr(f"{folder}/{character:04}_{drawing:02}.png", png)
    return root


@pytest.fixture(scope="session")
def synthetic_cache(synthetic_omniglot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache folder in which `synthetic_omniglot` is decoded; copy it before changing it."""
    folder = tmp_path_factory.mktemp("synthetic_cache")
    load_images(synthetic_omniglot, folder)
    return folder
