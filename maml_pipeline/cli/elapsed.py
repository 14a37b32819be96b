"""The time since the command was started, its imports included."""

import time


class _Clock:
    """State of this process."""

    began = time.monotonic()


def begin() -> None:
    """Start measuring: a process may run several commands."""
    _Clock.began = time.monotonic()


def seconds() -> float:
    """Return the seconds since the command was started."""
    return time.monotonic() - _Clock.began
