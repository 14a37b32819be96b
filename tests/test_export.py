"""An exported network loads into the plain module and predicts as the run's network does, bit by bit."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from maml_pipeline import MetaLearner
from maml_pipeline.cli import main
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO
from tests.helpers import Maml, read_checkpoint, read_files, run_python
from tests.written_runs import write_run

LOAD: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".pt": lambda path: torch.load(path, weights_only=True),
}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}


def write_checkpoint(folder: Path, which: str, state: dict[str, Tensor], meta_step: int = 7) -> None:
    """Write a checkpoint of a run, with the `state_dict` of its network."""
    checkpoint = {
        "state_dict": {f"network.{name}": value for name, value in state.items()},
        **{"global_step": meta_step, "pytorch-lightning_version": "2.6.4"},
    }
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints" / f"{which}.ckpt")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run with a linear network, whose best and last checkpoints differ."""
    folder = write_run(tmp_path / "runs" / "a", "checkpointed", 5, network=LINEAR, inner_lr=0.4)
    for meta_step, which in enumerate(("best", "last"), 7):
        torch.manual_seed(meta_step)
        write_checkpoint(folder, which, nn.Linear(1, 1).state_dict(), meta_step)
    return folder


def built(config: Path) -> nn.Module:
    """Build the plain network that an exported YAML file describes."""
    settings = yaml.safe_load(config.read_text())["network"]
    module, _, name = settings["class_path"].rpartition(".")
    network: nn.Module = getattr(import_module(module), name)(**settings["init_args"])
    return network


# Predictions --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, synthetic_omniglot: Path) -> dict[str, Path]:
    """Return the folders of short runs whose best checkpoint is not the last, by their network."""
    folder = tmp_path_factory.mktemp("trained")
    short = [
        *("--trainer.enable_progress_bar", "false", "--trainer.max_steps", "5"),
        *("--trainer.val_check_interval", "2", "--data.val_tasks", "2", "--data.test_tasks", "2"),
        *("--model.engine", "vectorized"),
    ]
    mlp = ["--config", "toy", "--model.network", "maml_pipeline.networks.MLP"]
    convnet = [
        *("--config", "omniglot/5way_1shot", "--data.tasks.root", str(synthetic_omniglot)),
        *("--data.tasks.cache_dir", str(folder / "cache"), "--model.network.filters", "8"),
        *("--data.meta_batch_size", "2", "--data.num_workers", "0"),
    ]
    for name, settings in (("MLP", mlp), ("ConvNet", convnet)):
        main(["fit", *settings, *short, "--run.dir", str(folder / name)])
    return {name: folder / name for name in ("MLP", "ConvNet")}


@pytest.mark.integration
@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("suffix", LOAD)
@pytest.mark.parametrize(("name", "shape"), [("MLP", (6, 1)), ("ConvNet", (6, 1, 28, 28))])
def test_the_plain_network_predicts_as_the_network_of_the_run(
    name: str,
    shape: tuple[int, ...],
    suffix: str,
    which: Any,
    trained: dict[str, Path],
    maml: Maml,
    tmp_path: Path,
) -> None:
    out = tmp_path / f"network{suffix}"
    maml("export", trained[name], out, "--which", which)
    network = built(out.with_suffix(".yaml")).eval()
    x = torch.randn(shape)
    initial = network(x)
    network.load_state_dict(LOAD[suffix](out))
    ours = MetaLearner.from_run(trained[name], which=which).network
    assert torch.equal(network(x), ours(x)) and not torch.equal(network(x), initial)


@pytest.mark.integration
def test_an_export_is_used_without_this_package(run: Path, maml: Maml, tmp_path: Path) -> None:
    maml("export", run, "net.safetensors")
    script = f"""
        import sys, torch, yaml
        from safetensors.torch import load_file
        from importlib import import_module
        sys.modules["maml_pipeline"] = None
        settings = yaml.safe_load(open({str(tmp_path / "net.yaml")!r}))["network"]
        module, _, name = settings["class_path"].rpartition(".")
        network = getattr(import_module(module), name)(**settings["init_args"])
        network.load_state_dict(load_file({str(tmp_path / "net.safetensors")!r}))
        print(network(torch.ones(1, 1)).item())
    """
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    trained = read_checkpoint(run, "best")["state_dict"]
    expected = nn.functional.linear(torch.ones(1, 1), trained["network.weight"], trained["network.bias"])
    assert float(done.stdout) == expected.item()


# Contents -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, a view of a larger tensor, a buffer, and several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(1000, 3)[5].to(torch.bfloat16))
        self.kernel = nn.Parameter(torch.randn(3, 2).t())
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize("suffix", LOAD)
def test_tied_parameters_views_and_dtypes_are_kept(suffix: str, run: Path, maml: Maml) -> None:
    torch.manual_seed(1)
    network = Tied()
    write_checkpoint(run, "best", network.state_dict())
    maml("export", run, f"net{suffix}")
    loaded = LOAD[suffix](Path(f"net{suffix}"))
    assert loaded.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)
    assert Path(f"net{suffix}").stat().st_size < 8000  # not the tensor that a view is of
    other = Tied()
    other.load_state_dict(loaded)
    assert other.first.weight is other.second.weight and torch.equal(other.scale, network.scale)


def test_the_config_names_network_adaptation_run_checkpoint_and_result(run: Path, maml: Maml) -> None:
    maml("export", run, "best.pt")
    maml("export", run, "last.pt", "--which", "last")
    best, last = (yaml.safe_load(Path(f"{which}.yaml").read_text()) for which in ("best", "last"))
    assert best["network"] == last["network"] == LINEAR
    assert best["adaptation"]["inner_lr"] == 0.4 and best["adaptation"]["inner_steps"] == 5
    assert best["source"] == {
        **{"run": "runs/a", "checkpoint": "best.ckpt", "meta_step": 7, "experiment": "sine"},
        **{"order": "checkpointed", "seed": 0},
        "result": {"measure": "test/loss", "mean": 0.25, "ci95": 0.0625},
    }
    # The test measured the best checkpoint.
    changed = {"checkpoint": "last.ckpt", "meta_step": 8, "result": None}
    assert last["source"] == {**best["source"], **changed}


def test_without_a_validation_the_last_checkpoint_is_exported_with_its_result(
    run: Path, maml: Maml
) -> None:
    (run / "checkpoints" / "best.ckpt").unlink()
    assert "Exported: last.ckpt of runs/a, from meta-step 8" in maml("export", "runs/a", "net.pt")
    assert yaml.safe_load(Path("net.yaml").read_text())["source"]["result"]["mean"] == 0.25


# Files --------------------------------------------------------------------------------------------


def test_both_formats_share_a_config_and_an_export_can_be_repeated(run: Path, maml: Maml) -> None:
    for name in ("models/net.pt", "models/net.safetensors"):
        assert maml("export", run, name).startswith("Exported: best.ckpt")
    before = read_files(Path("models"))
    assert before.keys() == {"net.pt", "net.safetensors", "net.yaml"}
    for name in ("models/net.pt", "models/net.safetensors"):
        assert maml("export", run, name).startswith("Already exported: best.ckpt")
    Path("models/net.yaml").unlink()  # as after a kill between the two files
    assert maml("export", run, "models/net.pt").startswith("Exported: best.ckpt")
    assert read_files(Path("models")) == before


@pytest.mark.parametrize("existing", ["net.pt", "net.yaml"])
def test_another_file_is_never_overwritten(
    existing: str, run: Path, maml_error: Maml, tmp_path: Path
) -> None:
    (tmp_path / existing).write_text("mine")
    error = maml_error("export", run, "net.pt")
    assert f"{existing} exists and is not this export; name another file, or remove it first" in error
    assert (tmp_path / existing).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", existing}


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("runs/a net.onnx", "OUT net.onnx must end in .safetensors or .pt"),
        ("runs/a net", "OUT net must end in .safetensors or .pt"),
        ("runs/a folder.pt", "OUT folder.pt is a folder; name a file"),
        ("runs/a runs/a/config.yaml/net.pt", "cannot be"),
        ("runs/nope net.pt", "runs/nope does not exist"),
        ("runs net.pt", "runs is not a run but holds several; name one of them: a, complex"),
        ("runs/damaged net.pt", "best.ckpt is not a checkpoint of this program, or is damaged"),
        ("runs/new net.pt", "run runs/new has no last.ckpt yet"),
        ("runs/strange net.pt", "run runs/strange cannot be read: config.yaml is not YAML"),
        ("runs/no-network net.pt", "no-network has a config without model.network.class_path"),
        ("runs/other net.pt", "best.ckpt has no network; name a run of maml fit"),
        ("runs/complex net.safetensors", "safetensors cannot store the network (torch.complex128)"),
        ("runs/a net.pt --which first", "--which is first; it must be one of best, last"),
        ("runs/a", "OUT"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(
    arguments: str, message: str, run: Path, maml_error: Maml, tmp_path: Path
) -> None:
    write_run(run.parent / "new")
    for name in ("damaged", "strange", "no-network", "other", "complex"):
        folder = write_run(run.parent / name, network=None if name == "no-network" else LINEAR)
        dtype = torch.complex128 if name == "complex" else torch.float32
        write_checkpoint(folder, "best", nn.Linear(1, 1, dtype=dtype).state_dict())
    damaged = run.parent / "damaged" / "checkpoints" / "best.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    (run.parent / "strange" / "config.yaml").write_text("{")
    empty: dict[str, Any] = {"state_dict": {}, "global_step": 1, "pytorch-lightning_version": "2"}
    AtomicCheckpointIO().save_checkpoint(empty, run.parent / "other" / "checkpoints" / "best.ckpt")
    (tmp_path / "folder.pt").mkdir()
    before = {*tmp_path.rglob("*")}
    assert message in maml_error("export", *arguments.split())
    assert {*tmp_path.rglob("*")} == before


def test_a_full_or_unwritable_disk_leaves_no_file(run: Path, maml_error: Maml, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(28, os.strerror(28))

        patch.setattr(os, "fsync", fail)
        assert "net.pt: No space left on device" in maml_error("export", run, "net.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
