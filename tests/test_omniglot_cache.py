"""Omniglot's cache is used if it is intact, and rebuilt otherwise."""

import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.omniglot_cache import SECONDS_TO_WRITE, read_cache, write_cache
from maml_pipeline.tasks.omniglot_images import SHAPE, load_images


def test_a_valid_cache_is_used_and_a_damaged_one_rebuilt(
    synthetic_omniglot: Path, synthetic_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(synthetic_cache, tmp_path, dirs_exist_ok=True)
    packed = load_images(synthetic_omniglot, tmp_path)
    (cache,) = tmp_path.iterdir()
    intact = cache.read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr("maml_pipeline.tasks.omniglot_images.decode_all", None)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)

    packings: list[object] = []

    def pack_again(halves: object) -> np.ndarray:
        packings.append(halves)
        return packed

    monkeypatch.setattr("maml_pipeline.tasks.omniglot_images.decode_all", pack_again)
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
    for count, damaged in enumerate((b"", intact[:1000], intact[:-100], flipped), start=1):
        cache.write_bytes(damaged)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path), packed)
        assert len(packings) == count


def test_any_damage_to_a_cache_is_detected(tmp_path: Path) -> None:
    cache = tmp_path / "omniglot-0.npz"
    random = np.random.default_rng(0)
    packed = random.integers(256, size=(3, 20, 28, 28), dtype=np.uint8)
    write_cache(cache, packed)
    intact = cache.read_bytes()
    used = read_cache(cache, packed.shape)
    assert used is not None and np.array_equal(used, packed)

    ends = [*range(300), *range(len(intact) - 300, len(intact))]  # every byte of the headers
    for place in [*ends, *random.integers(len(intact), size=400)]:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << int(random.integers(8))
        cache.write_bytes(damaged)
        assert read_cache(cache, packed.shape) is None, place
    for length in (0, 1, 1000, len(intact) - 1, len(intact) - 100):
        cache.write_bytes(intact[:length])
        assert read_cache(cache, packed.shape) is None


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1623, 20, 28, 28), dtype=np.uint8),
        np.ones((1623, 20, 28, 27), dtype=np.uint8),
        np.ones((1623, 20, 28, 28), dtype=np.int8),
    ],
    ids=["blank", "wrong shape", "wrong type"],
)
def test_a_cache_with_other_contents_is_not_used(tmp_path: Path, images: np.ndarray) -> None:
    cache = tmp_path / "omniglot-0.npz"
    write_cache(cache, images)
    assert read_cache(cache, SHAPE) is None
    with cache.open("wb") as file:
        np.savez(file, images=images)  # by another program, without a checksum
    assert read_cache(cache, SHAPE) is None
    assert read_cache(tmp_path, SHAPE) is None
    assert read_cache(tmp_path / "nothing", SHAPE) is None


def test_writing_a_cache_removes_files_left_by_killed_processes(tmp_path: Path) -> None:
    ours = ("tmpa1b2c3d4.npz", ".omniglot-0.npz.123", ".omniglot-0.npz.1f3e.unfinished")
    for name in (*ours, ".omniglot-1.npz.124", "tmpstranger.npz", "tmp12345678.npz"):
        content = b"PK\3\4" + bytes(26) + b"images.npy" if name == ours[0] else b"other"
        (tmp_path / name).write_bytes(content)
        age = 0 if "124" in name else 2 * SECONDS_TO_WRITE  # 124 may still be writing
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_cache(tmp_path / "omniglot-0.npz", np.ones((1, 20, 28, 28), dtype=np.uint8))
    kept = {".omniglot-1.npz.124", "tmpstranger.npz", "tmp12345678.npz", "omniglot-0.npz"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.integration
def test_two_processes_can_load_at_the_same_time(synthetic_omniglot: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as processes:
        results = list(processes.map(load_images, [synthetic_omniglot] * 2, [tmp_path] * 2))
    assert np.array_equal(results[0], results[1])
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir .*file/cache cannot be created"):
        write_cache(tmp_path / "file" / "cache" / "omniglot-0.npz", np.ones(1, dtype=np.uint8))
