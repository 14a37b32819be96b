"""A damaged checkpoint is rejected in one line, no matter where the damage is."""

import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from maml_pipeline.errors import UserError
from maml_pipeline.learner.checkpoints import AtomicCheckpointIO, load_checkpoint
from tests.helpers import CONFIGS, read_files

SHORT = (
    *("fit", "--config", CONFIGS / "toy.yaml", "--trainer.max_steps", 4, "--data.test_tasks", 4),
    *("--trainer.val_check_interval", 2, "--data.val_tasks", 4, "--run.checkpoint_every", 2),
)
STATE = {
    "state_dict": {"network.weight": torch.ones(3)},
    "global_step": 4,
    "pytorch-lightning_version": "2.6.0",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a checkpoint as a short run writes it."""
    from maml_pipeline.cli import main

    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        main([str(argument) for argument in (*SHORT, "--run.dir", folder)])
    return (folder / "checkpoints" / "last.ckpt").read_bytes()


def assert_refused(path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert str(path) in message and len(message.splitlines()) == 1


def test_torch_load_reads_the_same_checkpoint(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint)
    ours, plain = load_checkpoint(path, resumes=True), torch.load(path, weights_only=True)
    assert ours.keys() == plain.keys() and ours["global_step"] == 4
    for name, value in plain["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value)


def flips(checkpoint: bytes) -> Iterator[tuple[int, int]]:
    """Yield positions and bits: every byte of the first and last headers, and random ones between."""
    chosen = random.Random(0)
    places = {*range(120), *range(len(checkpoint) - 600, len(checkpoint))}
    places |= set(chosen.sample(range(len(checkpoint)), 1000))
    for place in sorted(places):
        yield place, 1 << chosen.randrange(8)


def test_any_flipped_bit_is_detected(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for place, bit in flips(checkpoint):
        path.write_bytes(checkpoint[:place] + bytes([checkpoint[place] ^ bit]) + checkpoint[place + 1 :])
        assert_refused(path)


def test_a_truncated_or_extended_file_is_detected(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    lengths = random.Random(1).sample(range(len(checkpoint)), 100)
    for damaged in [*(checkpoint[:n] for n in (0, 1, *lengths, -1, -70, -74)), checkpoint + b"\0"]:
        path.write_bytes(damaged)
        assert_refused(path)


def _save_legacy(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


NOT_CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "a folder": Path.mkdir,
    "text": lambda path: path.write_text("state_dict: 1\n"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(STATE)),
    "a pickle of code": lambda path: path.write_bytes(pickle.dumps(print)),
    "PyTorch's old format": _save_legacy,
    "NumPy's archive": lambda path: np.savez(path.open("wb"), weights=np.ones(3)),
    "a whole module": lambda path: torch.save(torch.nn.Linear(1, 1), path),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("write", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_other_files_are_rejected(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "last.ckpt")
    assert_refused(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ([STATE], "it holds a list, not a dict"),
        (STATE | {"state_dict": [1]}, "no state_dict of type dict"),
        (
            STATE | {"state_dict": {"network.weight": 1.0}},
            "network.weight in its state_dict is a float, not a tensor",
        ),
        (
            STATE | {"state_dict": {1: torch.ones(1)}},
            "1 in its state_dict is a int, not a",
        ),
        (STATE | {"global_step": "4"}, "no global_step of type int"),
        (STATE | {"pytorch-lightning_version": None}, "no pytorch-lightning_version of type str"),
        *(
            ({key: value for key, value in STATE.items() if key != missing}, f"it has no {missing}")
            for missing in STATE
        ),
    ],
)
def test_a_missing_part_or_one_of_a_wrong_type_is_named(tmp_path: Path, state: Any, reason: str) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state, path)
    with pytest.raises(UserError, match=reason):
        load_checkpoint(path)


def test_a_plain_trainers_checkpoint_can_be_tested_but_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save(STATE, path)
    assert load_checkpoint(path)["global_step"] == 4
    with pytest.raises(UserError, match="was not written by maml fit and cannot be resumed"):
        load_checkpoint(path, resumes=True)
    weights = torch.ones(3).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weights, torch.tensor([1.0, 1.0, 2.0]).numpy().tobytes()))
    assert_refused(path)


class Damage(Callback):
    """Flips a bit of a file when training ends."""

    path: Path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        damage(self.path)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_command_rejects_a_damaged_checkpoint_and_writes_nothing(
    maml: Any, maml_error: Any, tmp_path: Path
) -> None:
    run = (*SHORT, "--run.dir", tmp_path / "run")
    maml(*run)
    best, last = (tmp_path / "run" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    damage(best)
    damage(last)
    before = read_files(tmp_path / "run")
    config = ("--config", tmp_path / "run" / "config.yaml")
    for command in (
        (*run, "--ckpt_path", "last"),
        ("test", *config, "--ckpt_path", "best"),
        ("validate", *config, "--ckpt_path", last),
    ):
        assert "ckpt is not a checkpoint of this program, or is damaged" in maml_error(*command)
    assert read_files(tmp_path / "run") == before


def test_the_test_after_training_rejects_a_damaged_checkpoint(
    maml_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "run" / "checkpoints" / "best.ckpt"
    monkeypatch.setattr(Damage, "path", best, raising=False)
    spy = "--trainer.callbacks=tests.test_damaged_checkpoints.Damage"
    message = maml_error(*SHORT, spy, "--run.dir", tmp_path / "run")
    assert f"ckpt_path {best} is not a checkpoint of this program, or is damaged" in message
