"""The `maml` command: its files, its reproducibility and its error messages."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from maml_pipeline.learner import MetaLearner
from maml_pipeline.learner.tracking import logged_in
from maml_pipeline.shipped_files import shipped_configs
from tests.helpers import CONFIGS, SHORT, Maml, final_weights, run_python

pytestmark = pytest.mark.integration
LEARN2LEARN = ("--model.engine", "learn2learn")


def test_help_answers_without_importing_pytorch() -> None:
    script = """
        import sys
        from maml_pipeline.cli import main
        try:
            main(["--help"])
        except SystemExit as done:
            assert done.code == 0
        heavy = {"torch", "pytorch_lightning", "learn2learn", "wandb", "numpy"} & sys.modules.keys()
        assert not heavy, heavy
    """
    run_python(script).check_returncode()


def test_importing_the_learner_needs_neither_wandb_nor_a_gym_banner() -> None:
    script = "import sys; from maml_pipeline import MetaLearner; assert 'wandb' not in sys.modules"
    done = run_python(script)
    done.check_returncode()
    assert "unmaintained" not in done.stdout + done.stderr


def test_a_run_is_one_folder_with_config_checkpoints_metrics_and_result(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    printed = maml("fit", *SHORT)
    folder = tmp_path / "runs" / "toy-second-s0"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    names = set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"step", "train/loss", "val/loss", "test/loss"} < names
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))

    result = json.loads((folder / "test.json").read_text())
    for step in range(4):
        row = f"{result[f'test/loss_step_{step}']:.4f} ± {result[f'test/loss_step_{step}_ci95']:.4f}"
        assert row in printed
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 12 and config["model"]["first_order"] is False


def test_a_run_is_tested_from_its_config(maml: Maml, tmp_path: Path) -> None:
    maml("fit", *SHORT)
    folder = tmp_path / "runs" / "toy-second-s0"
    fitted = json.loads((folder / "test.json").read_text())
    (folder / "test.json").unlink()
    maml("test", "--config", folder / "config.yaml")
    assert json.loads((folder / "test.json").read_text()) == fitted
    maml("validate", "--config", folder / "config.yaml")
    assert json.loads((folder / "val.json").read_text())["meta_step"] == fitted["meta_step"]


def test_a_seed_determines_the_weights(maml: Maml, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        maml("fit", *SHORT, "--seed_everything", seed, "--run.dir", tmp_path / name)
    a, b, c = (final_weights(tmp_path / name) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_flag_and_the_overlay_for_first_order_are_equivalent(maml: Maml, tmp_path: Path) -> None:
    maml("fit", *SHORT)
    maml("fit", *SHORT, "--model.first_order", "true")
    maml("fit", "--config", CONFIGS / "toy.yaml", "--config", CONFIGS / "first_order.yaml", *SHORT[2:])
    runs = tmp_path / "runs"
    flag, overlay = (final_weights(runs / f"toy-first-s0{number}") for number in ("", "-2"))
    assert torch.equal(flag, overlay)
    assert not torch.equal(flag, final_weights(runs / "toy-second-s0"))


@pytest.mark.parametrize("config", shipped_configs().values(), ids=lambda path: path.stem)
def test_every_config_parses(config: Path, maml: Maml, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(config.read_text())
    base = "toy.yaml" if config.parent == CONFIGS else "omniglot/20way_1shot.yaml"
    below = [] if "seed_everything" in values else ["--config", CONFIGS / base]  # else an overlay
    with pytest.raises(SystemExit) as done:
        maml("fit", *below, "--config", config, "--print_config")
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["inner_lr"] > 0
    if below and "omniglot" in base:  # the tasks of the config below keep their other arguments
        tasks = printed["data"]["tasks"]["init_args"]
        assert tasks["ways"] == 20 and tasks == {**tasks, **values["data"]["tasks"]["init_args"]}


def test_omniglot_trains_from_its_config(
    maml: Maml, tmp_path: Path, synthetic_omniglot: Path, synthetic_cache: Path
) -> None:
    config = CONFIGS / "omniglot" / "5way_1shot.yaml"
    root = ("--data.tasks.root", synthetic_omniglot, "--data.tasks.cache_dir", synthetic_cache)
    few = ("--trainer.max_steps", 2, "--data.meta_batch_size", 2, "--data.test_tasks", 2)
    maml("fit", "--config", config, "--config", CONFIGS / "cpu.yaml", *root, *few)
    result = json.loads((tmp_path / "runs" / "omniglot-5w1s-second-s0" / "test.json").read_text())
    assert 0 <= result["test/accuracy"] <= 1 and "test/accuracy_step_3_ci95" in result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.inner_rate", 1], "model.inner_rate"),
        (["--model.inner_lr", "fast"], "model.inner_lr"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--data.tasks", "Nothing"], "Nothing"),
        (["--model.inner_lr", -0.1], "model.inner_lr is -0.1; it must be a finite number above 0"),
        (["--model.inner_steps", -1], "error: model.inner_steps is -1; it must be at least 0"),
        (["--model.eval_inner_steps", -2], "eval_inner_steps is -2"),
        (["--model.engine", "higher"], "model.engine"),
        (
            ["--model.engine", "learn2learn", "--model.tasks_per_chunk", 8],
            "tasks_per_chunk is 8, but engine learn2learn",
        ),
        (["--model.tasks_per_chunk", 0], "model.tasks_per_chunk"),
        (["--model.first_order_meta_steps", -1], "model.first_order_meta_steps"),
        (["--data.meta_batch_size", 0], "error: data.meta_batch_size is 0; it must be at least 1"),
        (["--trainer.devices", 3], "data.meta_batch_size is 8, which 3 devices do not divide"),
        (["--trainer.devices", 8193], "trainer.devices is 8193, but this machine has "),
        (["--run.checkpoint_every", 0], "checkpoint_every is 0"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path nowhere.ckpt does not exist"),
        (["--ckpt_path", "last"], "there is no runs/toy-second-s0/checkpoints/last.ckpt"),
        (["--run.dir", "/dev/null/run"], "run.dir /dev/null/run cannot be created"),
        (["--model.network.init_args.out_features", 3], "network Linear"),
        (["--seed_everything", -1], "seed_everything"),
        (["--trainer.val_check_interval", 0.5], "val_check_interval"),
        (["--run.monitor", "val/accuracy"], "val/accuracy"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[object],
    message: str,
    maml_error: Callable[..., str],
    tmp_path: Path,
) -> None:
    error = maml_error("fit", *SHORT, *arguments)
    assert error.startswith("maml: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_omniglots_limits_are_named(
    maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAML_OFFLINE", "1")
    config = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml")
    missing = maml_error("fit", *config, "--data.tasks.root", tmp_path)
    assert f"error: data.tasks.root {tmp_path} does not contain Omniglot" in missing
    assert "error: data.tasks.ways is 101; it must be at most 100" in maml_error(
        "fit", *config, "--data.tasks.ways", 101, "--model.network.ways", 101
    )
    assert "10 + 11 = 21; it must be at most 20" in maml_error(
        "fit", *config, "--data.tasks.shots", 10, "--data.tasks.query_shots", 11
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nProcess 1 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_reported_with_its_remedies(
    error: Exception, maml_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(MetaLearner, "training_step", fail)
    message = maml_error("fit", *SHORT)
    assert (
        message.startswith("maml: error: out of memory (") and "--model.tasks_per_chunk auto" in message
    )


def test_a_damaged_checkpoint_or_one_of_another_network_is_rejected(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    maml("fit", *SHORT)
    last = tmp_path / "runs" / "toy-second-s0" / "checkpoints" / "last.ckpt"
    other = ("--model.network", "maml_pipeline.networks.MLP", "--run.dir", tmp_path / "other")
    start = (*other, "--trainer.max_steps", 16, "--ckpt_path", last)
    assert "is of another network: network." in maml_error("fit", *SHORT, *start)
    last.write_bytes(last.read_bytes()[:1000])
    assert "or is damaged" in maml_error("test", *SHORT, "--ckpt_path", last)
    assert not (tmp_path / "other").exists()


def test_a_run_is_never_overwritten(maml: Maml, maml_error: Callable[..., str], tmp_path: Path) -> None:
    maml("fit", *SHORT, "--run.dir", tmp_path / "mine")
    before = (tmp_path / "mine" / "metrics.csv").read_text()
    message = maml_error("fit", *SHORT, "--run.dir", tmp_path / "mine")
    assert "already holds a run; add --ckpt_path last to resume it" in message
    assert (tmp_path / "mine" / "metrics.csv").read_text() == before


def test_wandb_is_online_only_after_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert logged_in()
