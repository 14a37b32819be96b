"""`MetaLearner.from_run` and `load_from_checkpoint` load what a training has saved, or say why not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import Engine
from maml_pipeline.meta_gradient.learn2learn_engine import learn2learn_maml
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import Lines, SineWaves, Task, TaskDistribution
from tests.helpers import SHORT, SHORT_NAME, Maml, make_trainer, network_weights, read_checkpoint
from tests.run_copies import config, each, edit, remove
from tests.test_damaged_checkpoints import damage

SINE = (
    *("--config", "sine", "--trainer.enable_progress_bar", "false", "--trainer.max_steps", 4),
    *("--trainer.val_check_interval", 2, "--data.val_tasks", 5, "--data.test_tasks", 26),
)
METHODS = ("first-k1-s0", "second-k2-s1", "checkpointed-k2-s0")


@pytest.fixture(scope="module")
def run(trained_runs: Path) -> Path:
    """Return the folder of a finished run; copy it before changing it."""
    return trained_runs / "lines" / "second-k1-s0"


def weights(folder: Path, which: str) -> Tensor:
    return torch.cat(
        [value.flatten() for value in read_checkpoint(folder, which)["state_dict"].values()]
    )


# A run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_each_method_is_loaded_to_the_bit(trained_runs: Path, name: str, which: Any) -> None:
    folder = trained_runs / "lines" / name
    learner = MetaLearner.from_run(folder, which)
    assert torch.equal(network_weights(learner), weights(folder, which))
    assert type(learner.network) is nn.Linear
    assert not any(module.training for module in learner.modules())
    settings = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert learner.inner.steps == settings["inner_steps"]
    assert learner.inner.first_order == settings["first_order"]
    assert learner.inner.method == settings["method"]
    assert (learner.eval_inner.lr, learner.eval_inner.steps) == (0.1, 3)


def test_the_best_checkpoint_is_the_default_and_the_last_one_its_substitute(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    best, last = weights(run, "best"), weights(run, "last")
    assert torch.equal(network_weights(MetaLearner.from_run(str(tmp_path / "run"))), best)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").unlink()
    assert torch.equal(network_weights(MetaLearner.from_run(tmp_path / "run")), last)


def measured_by_maml_test(maml: Maml, folder: Path, *settings: object) -> Tensor:
    """Return what `maml test` measures for each task after the last inner step: `(T,)`."""
    curves: list[Tensor] = []
    adaptation_curves = Engine.adaptation_curves

    def recorded(*arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        result = adaptation_curves(*arguments, **keywords)
        curves.append(result["loss"][:, -1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "adaptation_curves", recorded)
        maml("test", "--config", folder / "config.yaml", *settings)
    return torch.cat(curves)


def measured_by_hand(
    learner: MetaLearner, tasks: TaskDistribution, number: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    losses = []
    for index in range(number):
        task = Task(*(tensor.to(dtype) for tensor in tasks.task(0, "test", index)))
        model = learner.adapt(task.support_x, task.support_y)
        with torch.no_grad():
            losses.append(learner.loss(model(task.query_x), task.query_y))
    return torch.stack(losses)


@pytest.mark.integration
@pytest.mark.parametrize("settings", [(), ("--model.network.bias", "false")], ids=["toy", "no bias"])
def test_adapt_agrees_with_maml_test_to_the_bit_on_lines(
    maml: Maml, settings: tuple[object, ...]
) -> None:
    maml("fit", *SHORT, *settings)
    folder = Path("runs", SHORT_NAME)
    by_hand = measured_by_hand(MetaLearner.from_run(folder), Lines(), 9)
    assert torch.equal(by_hand, measured_by_maml_test(maml, folder))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ((), torch.float32),
        (("--trainer.precision", "64-true"), torch.float64),
        (("--model.engine", "learn2learn", "--model.first_order", "true"), torch.float32),
    ],
    ids=["float32", "float64", "learn2learn"],
)
def test_adapt_agrees_with_maml_test_to_the_bit_on_sines(
    maml: Maml, settings: tuple[object, ...], dtype: torch.dtype
) -> None:
    if "learn2learn" in settings:
        pytest.importorskip("learn2learn")
    maml("fit", *SINE, *settings, "--run.dir", "run")
    learner = MetaLearner.from_run("run")
    assert network_weights(learner).dtype == dtype
    by_hand = measured_by_hand(learner, SineWaves(shots=10), 26, dtype)
    # 26 tasks in batches of 25: the last task is alone in its batch.
    assert torch.equal(by_hand, measured_by_maml_test(maml, Path("run")))
    assert torch.equal(by_hand, measured_by_maml_test(maml, Path("run"), "--data.meta_batch_size", 7))
    reported = json.loads(Path("run", "test.json").read_text())["test/loss"]
    assert by_hand.mean().item() == pytest.approx(reported, rel=1e-6)


@pytest.mark.integration
def test_a_run_with_the_users_own_network_is_loaded(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\n\nclass Small(nn.Sequential):\n    def __init__(self, width: int):\n"
        "        super().__init__(nn.LazyLinear(width), nn.Tanh(), nn.LazyLinear(1))\n"
    )
    with monkeypatch.context() as path:
        path.syspath_prepend(tmp_path)
        maml("fit", *SHORT, "--model.network", "my_network.Small", "--model.network.width", 3)
        learner = MetaLearner.from_run(Path("runs", SHORT_NAME))
        assert type(learner.network).__name__ == "Small"
        by_hand = measured_by_hand(learner, Lines(), 9)
        assert torch.equal(by_hand, measured_by_maml_test(maml, Path("runs", SHORT_NAME)))
    del sys.modules["my_network"]
    message = r"model\.network of .* is my_network\.Small.*put the folder of my_network on PYTHONPATH"
    with pytest.raises(UserError, match=message):
        MetaLearner.from_run(Path("runs", SHORT_NAME))


# What it says -------------------------------------------------------------------------------------


def damaged(run: Path) -> None:
    damage(run / "checkpoints" / "best.ckpt")


UNREADABLE: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no folder": (shutil.rmtree, {}, r"run folder .*/run does not exist; name the folder of a run"),
    "no config": (remove("config.yaml"), {}, "is not the folder of a run: it has no config.yaml"),
    "no checkpoints": (remove("checkpoints"), {}, r"no checkpoints/; name another"),
    "no checkpoint": (
        each(remove("checkpoints/best.ckpt"), remove("checkpoints/last.ckpt")),
        *({}, r"has no last.ckpt yet; wait until its training has saved one"),
    ),
    "no last checkpoint": (remove("checkpoints/last.ckpt"), {"which": "last"}, "has no last.ckpt yet"),
    "damaged": (damaged, {}, "best.ckpt is not a checkpoint of this program, or is damaged"),
    "which": (lambda run: None, {"which": "first"}, "which is 'first'; it must be 'best' or 'last'"),
    "device": (lambda run: None, {"device": "gpu"}, "device is 'gpu', which PyTorch cannot use here"),
    "not YAML": (edit("config.yaml", lambda text: "model: ["), {}, "the run's config .* is not YAML"),
    "no model": (config("model", ...), {}, "config.yaml has no model with settings"),
    "no module": (
        config("model.network.class_path", "missing.SmallNet"),
        *({}, r"model\.network of .* is missing\.SmallNet.*put the folder of missing on PYTHONPATH"),
    ),
    "no class": (
        config("model.network.class_path", "torch.nn.Lineal"),
        *({}, r"model\.network of .* is torch\.nn\.Lineal, but torch\.nn has no Lineal"),
    ),
    "no loss": (config("model.loss", "mine.loss"), {}, r"model\.loss of .* is mine\.loss.*PYTHONPATH"),
    "another network": (
        config("model.network.init_args.in_features", 2),
        *({}, r"best.ckpt: the checkpoint is of another network: network.weight is \(1, 1\)"),
    ),
    "no such argument": (
        config("model.network.init_args.width", 2),
        *({}, "the learner of .*config.yaml cannot be built: .*'width' is not accepted"),
    ),
    "inner_lr": (config("model.inner_lr", -1), {}, "cannot be built: inner_lr is -1.0; it must be"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_it_says_in_a_line_why_a_run_cannot_be_loaded(name: str, run: Path, tmp_path: Path) -> None:
    change, settings, message = UNREADABLE[name]
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(UserError, match=message) as refused:
        MetaLearner.from_run(tmp_path / "run", **settings)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 420


def test_a_folder_of_several_runs_is_refused_with_their_names(trained_runs: Path) -> None:
    with pytest.raises(UserError, match=r"lines is not a run but holds several.*: checkpointed-k1-s0, "):
        MetaLearner.from_run(trained_runs / "lines")


def test_a_run_of_an_engine_that_is_not_installed_is_loaded_with_the_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    settings["model"]["engine"] = "learn2learn"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    monkeypatch.delitem(sys.modules, "learn2learn.algorithms", raising=False)
    learn2learn_maml.cache_clear()
    with pytest.warns(UserWarning, match="learn2learn, which cannot be imported; using native"):
        learner = MetaLearner.from_run(folder)
    learn2learn_maml.cache_clear()
    task = Lines().task(0, "test", 0)
    adapted = learner.adapt(task.support_x, task.support_y)
    expected = MetaLearner.from_run(run).adapt(task.support_x, task.support_y)
    torch.testing.assert_close(adapted(task.query_x), expected(task.query_x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="device is 'cuda', which PyTorch cannot use here"):
        MetaLearner.from_run(run, device="cuda")


# A checkpoint -------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_run_needs_no_arguments(run: Path, tmp_path: Path) -> None:
    for which in ("best", "last"):
        learner = MetaLearner.load_from_checkpoint(run / "checkpoints" / f"{which}.ckpt")
        assert torch.equal(network_weights(learner), weights(run, which))
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    message = r"alone.ckpt cannot .*no settings \(missing.*'network'\); call MetaLearner.load_from_"
    with pytest.raises(UserError, match=message):
        MetaLearner.load_from_checkpoint(tmp_path / "alone.ckpt")
    learner = MetaLearner.load_from_checkpoint(
        tmp_path / "alone.ckpt", network=nn.LazyLinear(1), loss=mse_loss, inner_lr=0.1
    )
    assert torch.equal(network_weights(learner), weights(run, "best"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": nn.Linear(1, 1)}, r"\(missing a required argument: 'loss'\); call MetaLearner"),
        (
            {"strict": False},
            "arguments do not fit .*'network'.* with none if the checkpoint is in a run's",
        ),
        ({"network": nn.Linear(1, 1), "loss": mse_loss, "inner_lr": 0.1, "alpha": 1}, "'alpha'"),
        ({"network": nn.Linear(1, 2), "loss": mse_loss, "inner_lr": 0.1}, "of another network"),
        ({"network": nn.Linear(1, 1), "loss": mse_loss, "inner_lr": 0}, "inner_lr is 0"),
    ],
)
def test_a_checkpoint_with_wrong_arguments_is_refused(
    run: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MetaLearner.load_from_checkpoint(run / "checkpoints" / "last.ckpt", **settings)


def test_lightnings_own_checkpoints_are_loaded(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": mse_loss, "inner_lr": 0.01}
    learner = MetaLearner(MLP(hidden_features=[8]), **settings)
    data = TaskDataModule(SineWaves(shots=5), meta_batch_size=4, val_tasks=5, test_tasks=6)
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = make_trainer(
        max_steps=6, val_check_interval=2, callbacks=[best], enable_checkpointing=True
    )
    trainer.fit(learner, datamodule=data)
    (expected,) = trainer.test(learner, datamodule=data, ckpt_path="best", verbose=False)
    loaded = MetaLearner.load_from_checkpoint(
        best.best_model_path, network=MLP(hidden_features=[8]), **settings
    )
    assert loaded.training  # as Lightning leaves it, to train further
    (result,) = make_trainer().test(loaded, datamodule=data, verbose=False)
    assert result == expected
    make_trainer(max_steps=1).fit(loaded, datamodule=data)
