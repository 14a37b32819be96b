"""Packed images: a cache is used if it is intact and rebuilt otherwise, by one process at a time."""

import os
import pickle
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from maml_pipeline.errors import UserError
from maml_pipeline.tasks.image_cache import (
    LOCK,
    SECONDS_TO_WRITE,
    PackedImages,
    load_or_pack,
    read_cache,
    write_cache,
)
from maml_pipeline.tasks.omniglot_images import load_images

IMAGES = np.random.default_rng(0).integers(256, size=(6, 3, 8, 8), dtype=np.uint8)
NAMES = ["cat", "10", "9", "cat", "dog", "9"]


def write(file: Path) -> None:
    """Write six images of four classes, of which two are numbers."""
    write_cache(file, IMAGES.shape, zip(IMAGES, NAMES, strict=True), ["dog", "cat"])


def assert_is_ours(packed: PackedImages | None) -> None:
    """Check that these are the images of `write`."""
    assert packed is not None
    assert np.array_equal(packed.images, IMAGES)
    assert [packed.classes[label] for label in packed.labels] == NAMES
    assert packed.classes == ["dog", "cat", "9", "10"]


def test_images_labels_and_names_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "cache.npy")
    assert_is_ours(read_cache(tmp_path / "cache.npy"))
    assert np.array_equal(np.load(tmp_path / "cache.npy", mmap_mode="r"), IMAGES)


def test_images_are_mapped_and_not_copied_to_another_process(tmp_path: Path) -> None:
    write(tmp_path / "cache.npy")
    packed = read_cache(tmp_path / "cache.npy")
    assert packed is not None and isinstance(packed.images, np.memmap)
    sent = pickle.dumps(packed)
    assert len(sent) < IMAGES.nbytes
    assert_is_ours(pickle.loads(sent))
    (tmp_path / "cache.npy").unlink()
    assert_is_ours(packed)
    with pytest.raises(UserError, match=r"cache .*cache.npy was removed during the run"):
        pickle.loads(sent)


def test_a_valid_cache_is_used_and_a_damaged_one_rebuilt(
    synthetic_omniglot: Path, synthetic_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(synthetic_cache, tmp_path, dirs_exist_ok=True)
    packed = load_images(synthetic_omniglot, tmp_path)
    cache = packed.file
    assert cache is not None
    images, intact = np.array(packed.images), cache.read_bytes()

    with monkeypatch.context() as patched:
        patched.setattr("maml_pipeline.tasks.omniglot_images.decode_all", None)
        assert np.array_equal(load_images(synthetic_omniglot, tmp_path).images, images)

    packings: list[object] = []

    def pack_again(halves: object) -> Iterator[tuple[np.ndarray, str]]:
        packings.append(halves)
        return ((image, str(number // 20)) for number, image in enumerate(images))

    monkeypatch.setattr("maml_pipeline.tasks.omniglot_images.decode_all", pack_again)
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
    for count, damaged in enumerate((b"", intact[:1000], intact[:-100], flipped), start=1):
        cache.unlink()  # not truncated, because `packed` maps it
        cache.write_bytes(damaged)
        for _ in range(2):
            assert np.array_equal(load_images(synthetic_omniglot, tmp_path).images, images)
            assert len(packings) == count


def test_any_damage_to_a_cache_is_detected(tmp_path: Path) -> None:
    cache = tmp_path / "cache.npy"
    write(cache)
    intact = cache.read_bytes()
    random = np.random.default_rng(1)
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << int(random.integers(8))
        cache.write_bytes(damaged)
        assert read_cache(cache) is None, place
    for length in (0, 1, 70, 71, 72, 1000, len(intact) - 1, len(intact) - 100):
        cache.write_bytes(intact[:length])
        assert read_cache(cache) is None


def test_another_programs_file_is_not_used(tmp_path: Path) -> None:
    np.save(tmp_path / "cache.npy", IMAGES)
    for place in (tmp_path / "cache.npy", tmp_path, tmp_path / "nothing"):
        assert read_cache(place) is None


def test_writing_a_cache_removes_files_left_by_killed_processes(tmp_path: Path) -> None:
    left, writing, other = ".a.npy.1f3e.unfinished", ".b.npy.2a4b.unfinished", "other.npy"
    for name in (left, writing, other):
        (tmp_path / name).touch()
        age = 0 if name == writing else 2 * SECONDS_TO_WRITE
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "cache.npy")
    assert {path.name for path in tmp_path.iterdir()} == {writing, other, "cache.npy"}


def pack_slowly(folder: Path, file: Path) -> None:
    """Write the images, and a file that tells who did."""
    (folder / f"packed-by-{os.getpid()}").touch()
    time.sleep(0.5)
    write(file)


def load(folder: Path) -> PackedImages:
    """Load the cache in a folder."""
    return load_or_pack(folder / "cache" / "cache.npy", partial(pack_slowly, folder))


@pytest.mark.integration
def test_of_several_processes_one_packs_and_the_others_wait(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as processes:
        for packed in processes.map(load, [tmp_path] * 3):
            assert_is_ours(packed)
    assert len([*tmp_path.glob("packed-by-*")]) == 1
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"cache.npy", LOCK}


def test_a_failure_while_packing_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Path) -> None:
        def images() -> Iterator[tuple[np.ndarray, str]]:
            yield IMAGES[0], "cat"
            raise UserError("a picture is damaged")

        write_cache(file, IMAGES.shape, images())

    with pytest.raises(UserError, match="a picture is damaged"):
        load_or_pack(tmp_path / "new" / "deep" / "cache.npy", fail)
    assert not any(tmp_path.iterdir())


def test_an_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache_dir .*file/cache cannot be created"):
        load_or_pack(tmp_path / "file" / "cache" / "cache.npy", write)


def test_a_full_disk_is_reported_before_anything_is_read(tmp_path: Path) -> None:
    shape = (10**9, 3, 1000, 1000)
    with pytest.raises(UserError, match=r"cache_dir .* GB free, but the images take 3000000.00 GB"):
        write_cache(tmp_path / "cache.npy", shape, iter(()))
    assert not any(tmp_path.iterdir())
