"""Names of class folders in any encoding."""

import os
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from maml_pipeline.tasks import ImageTasks


def test_folder_names_need_not_be_utf_8(tmp_path: Path) -> None:
    for letter in b"\xe0\xe1\xe2\xe3\xe4\xe5":  # Latin-1
        folder = os.path.join(os.fsencode(tmp_path / "pictures"), bytes([letter]))
        try:
            os.makedirs(folder)
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
        for number in range(2):
            with open(os.path.join(folder, b"%d.png" % number), "wb") as file:
                Image.new("L", (4, 4), letter + number).save(file, "PNG")
    tasks = ImageTasks(
        4,
        lambda: ImageFolder(tmp_path / "pictures"),
        split_sizes=[2, 2, 2],
        ways=2,
        query_shots=1,
        cache_dir=tmp_path / "cache",
    )
    assert tasks.task(0, "train", 0).support_x.shape == (2, 3, 4, 4)
    assert [os.fsencode(name) for name in tasks.packed.classes] == [
        bytes([c]) for c in range(0xE0, 0xE6)
    ]
