"""Canaries for cli/python_internals.py: they fail first when an upgrade changes an undocumented part."""

import atexit
import platform


def test_exit_handlers_can_be_run() -> None:
    message = f"Python {platform.python_version()} changed atexit: see cli/python_internals.py"
    assert callable(getattr(atexit, "_run_exitfuncs", None)), message
