"""Python's garbage collector during imports."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector while modules are imported, and exempt what exists afterwards from it.

    PyTorch and Lightning create half a million objects that live as long as the process; each full
    collection would search all of them. `gc.unfreeze` ends the exemption.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
