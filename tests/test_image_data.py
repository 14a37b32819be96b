"""Meta-training on pictures: folders, grey and colour, CIFAR-100, data sets of one's own."""

import hashlib
import json
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torchvision
import yaml
from PIL import Image

from maml_pipeline.tasks import ImageTasks
from tests.helpers import CONFIGS, ROOT, Maml
from tests.test_readme import blocks

SHORT = (
    *(
        "--trainer.max_steps",
        2,
        "--trainer.val_check_interval",
        2,
        "--trainer.enable_progress_bar",
        "false",
    ),
    *(
        "--data.meta_batch_size",
        2,
        "--data.val_tasks",
        2,
        "--data.test_tasks",
        20,
        "--probes.every",
        100,
    ),
)
SMALL = ("--data.tasks.image_size", 16, "--model.network.image_size", 16)
MODES = ("RGB", "RGBA", "P", "L")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw_pictures(root: Path, classes: Sequence[str], pictures: int = 8) -> None:
    """Draw noisy pictures of several sizes and modes; the brightness of a class is its own."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        brightness = 40 + 200 * number / len(classes)
        for picture in range(pictures):
            shape = (*random.integers(12, 40, size=2), 3)
            pixels = random.normal(brightness, 5, size=shape).clip(0, 255).astype(np.uint8)
            mode = MODES[picture % len(MODES)]
            Image.fromarray(pixels).convert(mode).save(root / name / f"{picture}.png")


def accuracy(folder: Path) -> float:
    """Return the test accuracy of a run."""
    return float(json.loads((folder / "test.json").read_text())["test/accuracy"])


@pytest.mark.integration
def test_a_folder_of_easy_pictures_is_learnt_from_the_command_of_the_document(
    maml: Maml, tmp_path: Path
) -> None:
    draw_pictures(tmp_path / "pictures", [f"class{number:02}" for number in range(25)])
    root = ("--data.tasks.dataset.root", tmp_path / "pictures")
    maml("fit", "--config", "image_folder", *root, *SMALL, *SHORT)
    assert accuracy(tmp_path / "runs" / "pictures-5w1s-second-s0") > 0.4  # chance is 0.2


@pytest.mark.integration
def test_pictures_without_a_common_trait_are_not_learnt(maml: Maml, tmp_path: Path) -> None:
    names = [f"class{number:02}" for number in range(25)]
    draw_pictures(tmp_path / "pictures", names, pictures=24)
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    for file, other in zip(files, np.random.default_rng(1).permutation(len(files)), strict=True):
        file.write_bytes(contents[other])
    root = ("--data.tasks.dataset.root", tmp_path / "pictures")
    maml("fit", "--config", "image_folder", *root, *SMALL, *SHORT, "--data.test_tasks", 40)
    assert accuracy(tmp_path / "runs" / "pictures-5w1s-second-s0") < 0.3


@pytest.mark.integration
def test_three_folders_and_grey_pictures_train_from_the_config_of_the_document(
    maml: Maml, tmp_path: Path
) -> None:
    for split in ("train", "val", "test"):
        draw_pictures(tmp_path / "pictures" / split, [f"{split}{number}" for number in range(5)])
    (config,) = (block for block in blocks(ROOT / "docs/data.md", "yaml") if "train_dataset" in block)
    (tmp_path / "three_folders.yaml").write_text(config)
    grey = ("--data.tasks.channels", 1, "--model.network.in_channels", 1)
    maml("fit", "--config", "image_folder", "--config", "three_folders.yaml", *grey, *SMALL, *SHORT)
    assert accuracy(tmp_path / "runs" / "pictures-5w1s-second-s0") > 0.4


@pytest.mark.integration
def test_lists_of_names_split_a_folder(maml: Maml, maml_error: Maml, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", [f"class{number:02}" for number in range(10)])
    for split, numbers in (("train", range(5)), ("val", range(5, 7)), ("test", range(7, 9))):
        (tmp_path / f"{split}.txt").write_text("".join(f"class{number:02}\n" for number in numbers))
    lists = [
        *("--data.tasks.dataset.root", tmp_path / "pictures", "--data.tasks.split_sizes", "null"),
        *(
            part
            for split in ("train", "val", "test")
            for part in (f"--data.tasks.{split}_classes", f"{split}.txt")
        ),
        *("--data.tasks.ways", 2, "--model.network.ways", 2),
    ]
    maml("fit", "--config", "image_folder", *lists, *SMALL, *SHORT)
    assert (tmp_path / "runs" / "pictures-2w1s-second-s0" / "test.json").is_file()
    (tmp_path / "val.txt").write_text("class05\nclass6\n")
    message = maml_error("fit", "--config", "image_folder", *lists, *SMALL, *SHORT)
    assert (
        "val_classes contains 'class6', which ImageFolder does not have; did you mean 'class06'?"
        in message
    )


@pytest.mark.integration
def test_a_data_set_of_ones_own_trains_from_the_module_of_the_document(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module,) = (block for block in blocks(ROOT / "docs/data.md", "python") if "class Letters" in block)
    (tmp_path / "my_data.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    draw_pictures(tmp_path / "folders", [f"letter{number:02}" for number in range(25)])
    (tmp_path / "letters").mkdir()
    for file in (tmp_path / "folders").rglob("*.png"):
        file.rename(tmp_path / "letters" / f"{file.parent.name}_{file.name}")
    own = ("--data.tasks.dataset", "my_data.Letters", "--data.tasks.dataset.root", tmp_path / "letters")
    maml("fit", "--config", "image_folder", *own, *SMALL, *SHORT)
    assert accuracy(tmp_path / "runs" / "letters-5w1s-second-s0") > 0.4


@pytest.mark.integration
def test_omniglots_tree_trains_as_a_folder_of_pictures(
    maml: Maml, tmp_path: Path, real_omniglot: Path
) -> None:
    with zipfile.ZipFile(real_omniglot / "images_background.zip") as archive:
        greek = [name for name in archive.namelist() if "/Greek/" in name and name.endswith(".png")]
        archive.extractall(tmp_path, greek)
    root = tmp_path / "images_background" / "Greek"
    settings = (
        *("--data.tasks.dataset.root", root, "--data.tasks.split_sizes", "[14, 5, 5]"),
        *("--data.tasks.image_size", 28, "--model.network.image_size", 28),
        *("--data.tasks.channels", 1, "--model.network.in_channels", 1),
    )
    maml("fit", "--config", "image_folder", *settings, *SHORT)
    assert accuracy(tmp_path / "runs" / "Greek-5w1s-second-s0") > 0.3


# CIFAR-FS and mini-ImageNet ----------------------------------------------------------------------


def settings(config: str) -> dict[str, list[str]]:
    """Return the settings of the tasks of a shipped config."""
    loaded = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    arguments: dict[str, list[str]] = loaded["data"]["tasks"]["init_args"]
    return arguments


@pytest.mark.parametrize("config", ["cifar_fs/5way_1shot", "mini_imagenet/5way_1shot"])
def test_the_class_lists_have_the_sizes_of_the_papers_and_no_class_twice(config: str) -> None:
    lists = [settings(config)[f"{split}_classes"] for split in ("train", "val", "test")]
    assert [len(names) for names in lists] == [64, 16, 20]
    assert len({name for names in lists for name in names}) == 100


@pytest.mark.integration
def test_cifar_fs_trains_through_torchvision(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = settings("cifar_fs/5way_1shot")
    names = sorted(name for split in ("train", "val", "test") for name in tasks[f"{split}_classes"])
    write_cifar100(tmp_path / "cifar", names, monkeypatch)
    local = ("--data.tasks.dataset.root", tmp_path / "cifar", "--data.tasks.dataset.download", "false")
    maml("fit", "--config", "cifar_fs/5way_1shot", *local, *SHORT, "--data.test_tasks", 4)
    assert accuracy(tmp_path / "runs" / "cifar100-5w1s-second-s0") > 0.4


def write_cifar100(root: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an archive as torchvision unpacks it: 12 training and 4 test images of each class."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        written = pickle.dumps(content)
        (folder / name).write_bytes(written)
        return [name, hashlib.md5(written, usedforsecurity=False).hexdigest()]

    def batch(each: int) -> dict[str, object]:
        labels = np.repeat(np.arange(len(names)), each)
        brightness = 40 + 2.0 * labels[:, None]
        pixels = random.normal(brightness, 2, size=(len(labels), 3 * 32 * 32))
        return {"data": pixels.clip(0, 255).astype(np.uint8), "fine_labels": labels.tolist()}

    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [write("train", batch(12))])
    monkeypatch.setattr(cifar, "test_list", [write("test", batch(4))])
    name, md5 = write("meta", {"fine_label_names": [*names]})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})


def test_mini_imagenet_is_the_same_in_one_folder_and_in_three(tmp_path: Path) -> None:
    tasks = settings("mini_imagenet/5way_1shot")
    lists = {f"{split}_classes": tasks[f"{split}_classes"] for split in ("train", "val", "test")}
    for key, names in lists.items():
        draw_pictures(tmp_path / "three" / key.removesuffix("_classes"), names, pictures=2)
    (tmp_path / "one").mkdir()
    for folder in (tmp_path / "three").glob("*/n*"):
        (tmp_path / "one" / folder.name).symlink_to(folder)
    build = torchvision.datasets.ImageFolder
    one = ImageTasks(16, lambda: build(tmp_path / "one"), query_shots=1, **lists)  # type: ignore[arg-type]
    pool = [{"root": tmp_path / "three" / split} for split in ("train", "val", "test")]
    three = ImageTasks(16, build, pool, query_shots=1, **lists)  # type: ignore[arg-type]
    for split in ("train", "val", "test"):
        for first, second in zip(one.task(0, split, 7), three.task(0, split, 7), strict=True):
            assert first.equal(second)
