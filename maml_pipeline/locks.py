"""Advisory file locks, which the kernel releases when the process that holds them ends or is killed.

These are `flock` locks of the standard library and not those of the `filelock` package, because two
things are needed that it does not offer: shared locks (the cells of a trade-off may train side by side,
but not beside a whole trade-off), and a descriptor that a child process inherits, so that a training
keeps its folder locked when its parent is killed.

A lock file is never removed: a process that waits for the removed file and one that creates it anew
would both get a lock.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS_OF_A_PROBE = 0.05
"""Far longer than `is_locked` holds the lock that it tries, such as when another user lists the runs."""


class AlreadyLockedError(Exception):
    """Another process holds the lock."""


class LocksUnsupportedError(Exception):
    """The file system does not support locks."""


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[int]:
    """Lock a file for the duration of a block.

    Args:
        path: As for `acquire_lock`.
        shared: As for `acquire_lock`.

    Yields:
        The descriptor that holds the lock. A child process to which it is passed holds the lock too.

    Raises:
        AlreadyLockedError, LocksUnsupportedError, OSError: As for `acquire_lock`.
    """
    descriptor = acquire_lock(path, shared)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def acquire_lock(path: Path, shared: bool = False, wait: bool = False) -> int:
    """Lock a file until the returned descriptor is closed.

    Args:
        path: The lock file, which is created if it is missing.
        shared: Let other processes hold shared locks on the file at the same time.
        wait: Wait for the lock instead of raising `AlreadyLockedError`.

    Returns:
        The open descriptor. It is closed on `exec` unless it is made inheritable.

    Raises:
        AlreadyLockedError: Another process holds a lock that excludes this one.
        LocksUnsupportedError: The file system does not support locks.
        OSError: The file cannot be opened for writing.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            _flock(descriptor, shared, wait)
        except AlreadyLockedError:
            time.sleep(SECONDS_OF_A_PROBE)
            _flock(descriptor, shared, wait)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Tell whether any process holds a lock on a file.

    Returns:
        `False` if the file does not exist, cannot be read, or its file system does not support locks.
    """
    # NFS grants an exclusive lock only on a file that is open for writing. The last way, which needs no
    # more than a file that can be read, does not see shared locks.
    for mode, shared in ((os.O_RDWR, False), (os.O_RDONLY, False), (os.O_RDONLY, True)):
        try:
            descriptor = os.open(path, mode | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            _flock(descriptor, shared)
        except AlreadyLockedError:
            return True
        except LocksUnsupportedError:
            continue
        finally:
            os.close(descriptor)
        return False
    return False


def _flock(descriptor: int, shared: bool, wait: bool = False) -> None:
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, operation if wait else operation | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise AlreadyLockedError from error
    except OSError as error:
        raise LocksUnsupportedError(str(error)) from error
