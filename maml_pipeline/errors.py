"""The error that is shown to the user without a traceback."""

import traceback
from pathlib import Path

PACKAGE = Path(__file__).parent
SPEAKING = (RuntimeError, ValueError, TypeError, IndexError, Warning)
"""Errors whose text is clear without the name of their class."""


class UserError(ValueError):
    """An error that the user can fix; the text names the key, the value and what is right."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_without_worker_traceback(message))


def _without_worker_traceback(message: str) -> str:
    """Strip the traceback that PyTorch's DataLoader adds to the text of a worker's error."""
    if not message.startswith("Caught UserError in "):
        return message
    return message.rpartition("UserError: ")[2].strip()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip()


def describe(error: BaseException) -> str:
    """Describe an error in one line: type, first line of text, and line of the user's code."""
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
