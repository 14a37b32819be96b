"""Errors of the file system, such as a full disk, told in a line or two instead of a traceback."""

import errno
import os
import sys
from pathlib import Path
from signal import SIGPIPE

from maml_pipeline.runs.folder import LAST_CHECKPOINT

FULL = "free some space"
NOT_WRITABLE = "make it writable, or name another folder"
FAILED = "the file system has failed: look after it, or name a folder on another one"
GONE = "it was deleted while the command ran, or its file system is no longer mounted"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: NOT_WRITABLE,
    errno.EACCES: NOT_WRITABLE,
    errno.EPERM: NOT_WRITABLE,
    errno.EIO: FAILED,
    errno.ESTALE: FAILED,
    errno.ENOTCONN: FAILED,
    errno.ENOENT: GONE,
    errno.ENOTDIR: GONE,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more files to open",
    errno.ENAMETOOLONG: "give it a shorter name",
}
"""What helps, by the error's number."""


def exit_if_known(error: OSError) -> None:
    """End the command with a line or two, unless the error may be one of the program.

    Args:
        error: Whoever knows the file has put its name into `filename`.
    """
    if error.filename is None and _output_fails():
        _drop_output()
        if isinstance(error, BrokenPipeError):  # such as in `maml report RUN | head`
            sys.exit(128 + SIGPIPE)
        error.filename = "standard output"
    remedy = REMEDIES.get(error.errno or 0)
    if error.filename is None or remedy is None:
        return
    path = Path(os.fsdecode(error.filename))
    lines = [f"maml: error: {path}: {error.strerror}; {remedy}"]
    states = [folder / LAST_CHECKPOINT for folder in path.parents[:2]]
    for state in filter(Path.exists, states):
        lines.append(f"The state saved last, {state}, is whole: --ckpt_path last resumes from it")
    sys.exit("\n".join(lines))


def _output_fails() -> bool:
    """Tell whether it is the output that cannot be written."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Write what is held back to nowhere: the interpreter would fail with it as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
