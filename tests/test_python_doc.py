"""Every block of docs/python.md runs, in order, and does what the text says."""

import json
import shutil
from pathlib import Path

import pytest
from torch import Tensor, nn

from maml_pipeline import MetaLearner
from tests.helpers import ROOT
from tests.test_readme import blocks


def test_the_blocks_run_in_order(
    tmp_path: Path, trained_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_runs / "lines" / "second-k1-s0", tmp_path / "runs" / "toy-second-s0")
    load, further, agree, train, restore, engine, adapted = blocks(ROOT / "docs" / "python.md", "python")
    names: dict[str, object] = {}

    exec(load, names)
    assert type(names["model"]) is nn.Linear
    exec(further, names)
    assert (tmp_path / "adapted.pt").exists()
    exec(agree, names)
    measured = json.loads((tmp_path / "runs" / "toy-second-s0" / "test.json").read_text())
    test_loss = names["test_loss"]
    assert isinstance(test_loss, Tensor)
    assert test_loss.item() == pytest.approx(measured["test/loss"], rel=1e-6)

    exec(train, names)
    exec(restore, names)
    learner, trained = names["learner"], names["trainer"].lightning_module  # type: ignore[attr-defined]
    assert isinstance(learner, MetaLearner) and learner is not trained
    assert learner.eval_inner == trained.eval_inner

    exec(engine, names)
    exec(adapted, names)
    prediction = names["prediction"]
    assert isinstance(prediction, Tensor) and prediction.shape == (10, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "adapted.pt", "checkpoints"}
