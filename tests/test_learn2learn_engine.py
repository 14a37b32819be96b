"""learn2learn is optional: nothing but its engine needs it, and the engine says how to install it."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskBatch
from maml_pipeline.errors import UserError
from maml_pipeline.learner.tracking.description import provenance
from maml_pipeline.meta_gradient.learn2learn_engine import INSTALL_COMMANDS, learn2learn_maml
from tests.helpers import CONFIGS, Maml

ROOT = CONFIGS.parent


@pytest.fixture(params=["learn2learn", "learn2learn.algorithms"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the whole package, or a part of it as in a failed installation, impossible to import."""
    monkeypatch.setitem(sys.modules, request.param, None)
    if request.param == "learn2learn":
        monkeypatch.delitem(sys.modules, "learn2learn.algorithms", raising=False)
    learn2learn_maml.cache_clear()
    yield request.param
    learn2learn_maml.cache_clear()


def make_learner(**settings: str) -> MetaLearner:
    return MetaLearner(torch.nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1, **settings)  # type: ignore[arg-type]


def test_without_learn2learn_the_error_says_how_to_install_it(missing: str) -> None:
    with pytest.raises(UserError, match=r"engine learn2learn needs learn2learn, which cannot") as raised:
        make_learner(engine="learn2learn")
    reason, commands = str(raised.value).splitlines()
    assert missing in reason and "set engine to vectorized" in reason
    assert commands.split(" && ") == [*INSTALL_COMMANDS]


def test_without_learn2learn_no_run_is_started(missing: str, maml_error: Maml, tmp_path: Path) -> None:
    error = maml_error("fit", "--config", "toy", "--model.engine", "learn2learn")
    assert INSTALL_COMMANDS[1] in error
    assert not [*tmp_path.iterdir()]


def test_without_learn2learn_the_default_engine_works(missing: str, maml: Maml) -> None:
    batch = TaskBatch(*(torch.rand(4, 5, 1) for _ in range(4)))
    assert make_learner().meta_gradient(batch).keys() == {"weight", "bias"}
    assert "They agree" in maml("derive")


def test_a_run_records_no_version_of_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "maml_pipeline.learner.tracking.description.PACKAGES", ("torch", "no-such-package")
    )
    assert provenance(torch.device("cpu"), 1)["packages"].keys() == {"torch"}


def test_the_documented_commands_and_the_lock_install_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extra,) = project["project"]["optional-dependencies"]["learn2learn"]
    assert extra in project["dependency-groups"]["dev"]
    assert INSTALL_COMMANDS[1].endswith(f" {extra}")
    assert not any("learn2learn" in dependency for dependency in project["project"]["dependencies"])
    documented = re.findall(r"^pip install .*$", (ROOT / "docs" / "install.md").read_text(), re.M)
    assert [*INSTALL_COMMANDS] == [line for line in documented if line in INSTALL_COMMANDS]


@pytest.mark.integration
def test_training_imports_learn2learn_only_for_its_engine(tmp_path: Path) -> None:
    program = (
        "import sys; from maml_pipeline.cli import main\n"
        "main()\n"
        "assert not {'learn2learn', 'gym'} & sys.modules.keys()"
    )
    fit = ("fit", "--config", "toy", "--trainer.max_steps", "2", "--probes.every", "1")
    command = [sys.executable, "-W", "ignore", "-c", program, *fit]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
