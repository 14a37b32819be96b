"""The one error that is shown to a person without a traceback."""

import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent
SPEAKING = (RuntimeError, ValueError, TypeError, IndexError, Warning)
"""Errors whose text says enough without their name."""


class UserError(ValueError):
    """Something that a person can put right: the text names the key, the value and the remedy."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_without_worker_traceback(message))


def _without_worker_traceback(message: str) -> str:
    """Undo what PyTorch's DataLoader does to a worker's error: its text becomes the whole traceback."""
    if not message.startswith("Caught UserError in "):
        return message
    return message.rpartition("UserError: ")[2].strip()


def describe(error: BaseException) -> str:
    """Put an error into one line: its type, its first line, and where in the user's own code it rose."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else ""
    if not isinstance(error, SPEAKING) or not reason:
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename
        and not Path(frame.filename).is_relative_to(PACKAGE)
        and Path(frame.filename).is_file()
    ]
    return f"{reason} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else reason
