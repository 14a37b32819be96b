"""Undocumented parts of Python: used here and nowhere else.

Each has one name and one reason; tests/test_internals_python.py fails first when an upgrade changes one.
"""

import atexit


def run_exit_handlers() -> None:
    """Run every handler that `atexit.register` has registered, as the interpreter does when it ends.

    Undocumented: `atexit._run_exitfuncs`. A handler of ours, which could end the process, would run
    before those that were registered earlier, such as coverage's.
    """
    atexit._run_exitfuncs()
