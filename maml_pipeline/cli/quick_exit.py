"""The `maml` command as a program: it ends without the interpreter's teardown.

After PyTorch, Lightning and W&B were imported, the teardown takes half a second, in which it frees
memory that the operating system frees anyway.
"""

import gc
import inspect
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from maml_pipeline import cli
from maml_pipeline.cli.python_internals import run_exit_handlers


def main() -> NoReturn:
    """Run the `maml` command with the arguments of this process, and end the process.

    Exit handlers run and files are written as usual. An exception other than `SystemExit`, a thread to
    wait for, or a program around this one, such as a profiler, leave the end to the interpreter.
    """
    status: Any = None
    try:
        try:
            cli.run()
        except SystemExit as end:
            status = end.code
        if not (_is_embedded() or _has_threads_to_wait_for()):
            _end_process(status)
    finally:
        gc.unfreeze()
    sys.exit(status)


def _is_embedded() -> bool:
    """Tell whether something follows this program, such as the report of a profiler that runs it."""
    callers = [*_globals_of_callers(inspect.currentframe())]
    programs = {id(each) for each in callers if each.get("__name__") == "__main__"}
    names = {each.get("__name__") for each in callers}
    # `python -m` runs a program from the module `runpy`.
    return len(programs) != 1 or not names <= {"__main__", "runpy", __name__} or bool(sys.flags.inspect)


def _globals_of_callers(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    while frame is not None:
        yield frame.f_globals
        frame = frame.f_back


def _has_threads_to_wait_for() -> bool:
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    return any(not thread.daemon for thread in others)


def _end_process(status: Any) -> None:
    """End the process; return if its output cannot be written, which the interpreter reports."""
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    run_exit_handlers()
    _flush_open_files()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit((status or 0) & 0xFF)


def _flush_open_files() -> None:
    """Write what the buffers of files hold that nobody has closed."""
    for each in gc.get_objects():  # without those that exist since the imports, which are exempt
        if issubclass(type(each), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
            with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
                each.flush()
