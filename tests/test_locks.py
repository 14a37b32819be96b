"""File locks: exclusive or shared, never waiting, and held as long as any process has the descriptor."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from maml_pipeline.locks import (
    AlreadyLockedError,
    LocksUnsupportedError,
    acquire_lock,
    is_locked,
    locked,
)
from tests.helpers import locked_by_another_process

# Another open file of this process stands for another process, unless a test is about processes.


def test_an_exclusive_lock_excludes_all_others_until_it_is_released(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file):
        for shared in (False, True):
            with pytest.raises(AlreadyLockedError):
                acquire_lock(file, shared)
        assert is_locked(file)
    assert not is_locked(file) and file.exists()
    with locked(file):
        pass


def test_a_probe_at_the_same_moment_does_not_refuse_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = acquire_lock(tmp_path / ".lock")
    monkeypatch.setattr("maml_pipeline.locks.time.sleep", lambda seconds: os.close(probe))
    with locked(tmp_path / ".lock"):
        assert is_locked(tmp_path / ".lock")


def test_shared_locks_exclude_only_exclusive_ones(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file, shared=True), locked(file, shared=True):
        assert is_locked(file)
        with pytest.raises(AlreadyLockedError):
            acquire_lock(file)
    assert not is_locked(file)


def test_is_locked_creates_no_file(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "missing") and not [*tmp_path.iterdir()]


def test_a_rejected_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with locked(tmp_path / ".lock"):
        before = open_files()
        with suppress(AlreadyLockedError):
            acquire_lock(tmp_path / ".lock")
        assert open_files() == before


def test_a_file_system_without_locks_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(LocksUnsupportedError, match="Function not implemented"):
        acquire_lock(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_on_nfs_is_seen_although_it_needs_a_writable_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    flock = fcntl.flock

    def flock_of_nfs(descriptor: int, operation: int) -> None:
        needed = os.O_RDONLY if operation & fcntl.LOCK_SH else os.O_WRONLY
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE not in (needed, os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    with locked(tmp_path / ".lock", shared):
        assert is_locked(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")


def test_a_lock_of_another_user_on_nfs_is_seen_with_permission_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, opened = fcntl.flock, os.open

    def open_to_read(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *mode)

    def flock_of_nfs(descriptor: int, operation: int) -> None:
        if not operation & fcntl.LOCK_SH:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    with locked(tmp_path / ".lock"):
        monkeypatch.setattr(os, "open", open_to_read)
        monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
        assert is_locked(tmp_path / ".lock")
    assert not is_locked(tmp_path / ".lock")


def test_a_descriptor_is_closed_on_exec_unless_asked(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock") as descriptor:
        assert not os.get_inheritable(descriptor)


@pytest.mark.integration
def test_a_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked_by_another_process(file):
        assert is_locked(file)
    with locked(file):
        pass


@pytest.mark.integration
def test_a_child_that_inherits_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    wait = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with locked(file) as descriptor:
        child = subprocess.Popen(wait, stdin=subprocess.PIPE, pass_fds=[descriptor])
    try:
        assert is_locked(file)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert not is_locked(file)
