"""Report a full disk, too little memory and the like in one or two lines instead of a traceback."""

import errno
import os
import sys
from pathlib import Path
from signal import SIGPIPE

from maml_pipeline.errors import UserError, first_line
from maml_pipeline.run_folder import LAST_CHECKPOINT

FULL = "free some space"
NOT_WRITABLE = "make it writable, or name another folder"
FAILED = "the file system failed; check it, or name a folder on another one"
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
"""The remedy for each error number."""


def exit_if_known(error: OSError) -> None:
    """Exit with one or two lines, unless the error may be a bug in the program.

    Args:
        error: The error, with `filename` set where the file is known.
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
        lines.append(f"The last checkpoint, {state}, is intact: --ckpt_path last resumes from it")
    sys.exit("\n".join(lines))


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise an error with the remedies if memory was too small, on a GPU or on the CPU.

    Raises:
        UserError: It was.
    """
    from torch import OutOfMemoryError  # late: a wrong key is refused before PyTorch is imported

    is_known = isinstance(error, (MemoryError, OutOfMemoryError))
    if is_known or "can't allocate memory" in str(error):
        raise UserError(
            f"out of memory ({first_line(error)}); set --model.tasks_per_chunk auto (unless the engine "
            "is learn2learn), --model.method checkpointed (in second order), or a smaller "
            "--data.meta_batch_size"
        ) from error


def _output_fails() -> bool:
    """Return whether standard output cannot be written."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Discard buffered output, which the interpreter would otherwise fail to flush on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
