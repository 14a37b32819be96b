"""Any bad input ends a command with one or two lines and leaves nothing behind."""

import contextlib
import faulthandler
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest

from maml_pipeline.cli import main
from maml_pipeline.cli.resolved_config import ResolvedConfig
from tests.bad_inputs import TOY, Row, rows, write_inputs

SECONDS_TO_REFUSE, SECONDS_TO_GIVE_UP = 30, 120
LONGEST_MESSAGE = 420


class HangError(BaseException):
    """A command did not end in time. No `except Exception` catches this."""


class Outcome(NamedTuple):
    """How a command ended.

    Args:
        message: What it wrote to stderr.
        fault: What is wrong with the outcome, or `None`.
        left: Files and folders that it left behind.
    """

    message: str
    fault: str | None
    left: list[str]


@pytest.fixture
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "WANDB_API", "MAML_"))]:
        if name != "MAML_OMNIGLOT_ROOT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    write_inputs(tmp_path)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `HangError` if a command does not end, and end the process if that has no effect."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS_TO_REFUSE)
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(SECONDS_TO_GIVE_UP, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def run(row: Row, folder: Path) -> Outcome:
    """Run a command in this process as a shell would, and judge how it ended."""
    before = set(folder.rglob("*"))
    out, err = io.StringIO(), io.StringIO()
    status: str | int | None = None
    fault = None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.resetwarnings()
        for ignored in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", ignored)  # as Python does
        try:
            with time_limit():
                main(row.arguments)
            status = 0
        except SystemExit as end:
            status = end.code
        except HangError:
            fault = "hang"
        except BaseException as error:
            fault = "traceback: " + traceback.format_exception(error)[-1].strip()
    message = err.getvalue() + (status if isinstance(status, str) else "")
    message += "".join(f"\n{warning.message}" for warning in warned)
    message = message.strip()
    left = sorted(set(folder.rglob("*")) - before)
    for path in reversed(left):
        path.rmdir() if path.is_dir() else path.unlink()
    names = [str(path.relative_to(folder)) for path in left]
    return Outcome(message, fault or _fault(row, status, message), names)


def _fault(row: Row, status: object, message: str) -> str | None:
    if status in (0, None):
        return "not refused"
    if not 1 <= len(message.splitlines()) <= 2:
        return f"{len(message.splitlines())} lines"
    if len(message) > LONGEST_MESSAGE:
        return f"{len(message)} characters"
    if "Traceback" in message:
        return "traceback"
    return None if row.names in message else f"does not name {row.names}"


@pytest.mark.exhaustive
@pytest.mark.usefixtures("_workplace")
def test_bad_input_is_rejected_in_a_line_or_two_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    synthetic_omniglot: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAML_OMNIGLOT_ROOT", str(synthetic_omniglot))
    table = rows(ResolvedConfig(TOY).values)
    outcomes = {row: run(row, tmp_path) for row in table}
    faults = [(row, outcome) for row, outcome in outcomes.items() if outcome.fault or outcome.left]
    counts = {
        kind: sum(str(outcome.fault).startswith(kind) for _, outcome in faults)
        for kind in ("traceback", "hang", "not refused")
    }
    counts["left something behind"] = sum(bool(outcome.left) for _, outcome in faults)
    with capsys.disabled():
        print(f"\n{len(table)} bad inputs: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    assert len(table) >= 300
    assert not faults, "\n".join(
        f"maml {' '.join(row.arguments)}: {outcome.fault} {outcome.left}: {outcome.message}"
        for row, outcome in faults
    )
