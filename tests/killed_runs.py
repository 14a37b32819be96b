"""Run `maml` and kill it at a chosen file operation.

Runs are forked from a process that has imported everything. A request is a line of JSON on stdin, see
`Request`; the answer is a line of JSON on stdout, see `Answer`.
"""

import builtins
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

ROOT = Path(__file__).parent.parent
SECONDS_TO_RUN = 300
WRITING = set("wax+")


class Request(TypedDict):
    """A run, and when to kill it."""

    arguments: list[str]
    folder: str
    """The working directory; operations on files below it are counted."""
    kill_at: int | None
    """The index of the operation, from 0."""
    half: bool
    """Kill in the middle of the operation, a write, instead of before it."""
    seconds: float | None
    """Kill from outside after this time."""
    environment: dict[str, str]


class Answer(TypedDict):
    """How a run ended."""

    status: int
    """Its exit status; negative for the signal that killed it."""
    operations: list[str]
    """Its file operations, such as `write .test.json`."""
    output: str
    seconds: float


class Server:
    """The process from which runs are forked."""

    def __enter__(self) -> "Server":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.killed_runs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self

    def __exit__(self, *args: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(
        self,
        folder: Path,
        *arguments: object,
        kill_at: int | None = None,
        half: bool = False,
        seconds: float | None = None,
        wandb_mode: str = "disabled",
    ) -> Answer:
        """Run `maml` in a folder, and kill it if requested."""
        folder.mkdir(exist_ok=True)
        request = Request(
            arguments=[str(argument) for argument in arguments],
            folder=str(folder),
            kill_at=kill_at,
            half=half,
            seconds=seconds,
            environment={"WANDB_MODE": wandb_mode},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: Answer = json.loads(self.process.stdout.readline())
        return answer


class Operations:
    """Counts file operations below a folder, and kills this process at one of them."""

    def __init__(self, folder: Path, kill_at: int | None, half: bool, report: int) -> None:
        self.folder = os.path.realpath(folder) + os.sep
        self.kill_at = kill_at
        self.half = half
        self.report = report
        self.count = 0

    def counts(self, path: Any) -> bool:
        """Return whether a path, or an open file, lies below the folder."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)

    def begin(self, name: str, path: Any) -> bool:
        """Count an operation; kill at the chosen one, or return whether to do half of it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        os.write(self.report, f"{name} {os.path.basename(os.fsdecode(path))}\n".encode())
        is_chosen = self.count == self.kill_at
        self.count += 1
        if is_chosen and not self.half:
            kill()
        return is_chosen

    def install(self) -> None:
        """Watch every way in which Python changes files."""
        original_open = builtins.open

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not WRITING & set(mode) or not self.counts(file):
                return original_open(file, mode, *args, **kwargs)
            self.begin("open", file)
            return WatchedFile(original_open(file, mode, *args, **kwargs), file, self)

        builtins.open = io.open = open_
        for name in ("fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "truncate"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        original_os_open = os.open

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.counts(path):
                self.begin("open", path)
            return original_os_open(path, flags, *args, **kwargs)

        os.open = os_open

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is None and self.counts(path):
                self.begin(name, path)
            return original(path, *args, **kwargs)

        return call


class WatchedFile:
    """A file that is open for writing."""

    def __init__(self, file: Any, path: Any, operations: Operations) -> None:
        self.file = file
        self.path = path
        self.operations = operations

    def write(self, content: Any) -> int:
        """Write everything, or write half and kill this process."""
        if self.operations.begin("write", self.path):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            kill()
        return int(self.file.write(content))

    def __enter__(self) -> "WatchedFile":
        self.file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def kill() -> None:
    """Kill this process with a signal that cannot be caught."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run_child(request: Request, report: int, output: int) -> None:
    """Run the command in a forked process, which never returns."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        operations = Operations(Path(), request["kill_at"], request["half"], report)
        operations.install()
        from maml_pipeline.cli import main

        try:
            main(request["arguments"])
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _serve() -> None:
    import maml_pipeline.cli.training  # noqa: F401  # all that a run imports

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request: Request = json.loads(line)
        started = time.monotonic()
        with (
            open(os.memfd_create("report"), "rb+") as report,
            open(os.memfd_create("output"), "rb+") as output,
        ):
            child = os.fork()
            if child == 0:
                _run_child(request, report.fileno(), output.fileno())
            status = _wait(child, request["seconds"])
            report.seek(0)
            output.seek(0)
            answer = Answer(
                status=status,
                operations=report.read().decode().splitlines(),
                output=output.read().decode(errors="replace"),
                seconds=time.monotonic() - started,
            )
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(child: int, seconds: float | None) -> int:
    limit = time.monotonic() + (SECONDS_TO_RUN if seconds is None else seconds)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= limit:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


if __name__ == "__main__":
    _serve()
