"""Type the README's commands as a reader would: install the package, then use it in an empty folder.

    python scripts/run_readme.py --environment VENV --folder EMPTY_FOLDER

Needs nothing but Python. Every `bash` and `python` block is run in order, as it is printed, and the
`text` block after it is compared with what it printed: all words must occur, numbers may differ. A block
that is treated otherwise follows a comment, which is invisible when the README is rendered:

    <!-- run in the checkout -->      instead of the empty folder
    <!-- saved as FILE -->            instead of being run
    <!-- not run: the reason -->
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SAVED_AS = re.compile(r"saved as (\S+)")
BLOCK = re.compile(
    r"(?:<!-- ([^>]*) -->\n+)?^```(bash|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A block of code in a document.

    Args:
        language: `bash`, `python` or `text`.
        code: Its content.
        remark: The comment before it; empty if there is none.
        line: Its first line in the document.
    """

    language: str
    code: str
    remark: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    """Yield the blocks of a document in order."""
    for found in BLOCK.finditer(document):
        line = document[: found.start(3)].count("\n") + 1
        yield Block(found[2], found[3], found[1] or "", line)


def words(text: str) -> list[str]:
    """Return the words of a text; numbers and the lines of tables are left out."""
    return re.findall(r"[^\W\d_]{3,}", text)


def missing_words(shown: str, printed: str) -> list[str]:
    """Return the words of a `text` block that a command did not print."""
    known = set(words(printed))
    return [word for word in dict.fromkeys(words(shown)) if word not in known]


def run(block: Block, environment: Path, folder: Path) -> str:
    """Run a block; return what it printed.

    Raises:
        SystemExit: It failed.
    """
    programs = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": programs, "VIRTUAL_ENV": str(environment)}
    variables.pop("PYTHONPATH", None)
    program = ["bash", "-euo", "pipefail"] if block.language == "bash" else ["python", "-"]
    done = subprocess.run(
        program,
        input=block.code,
        env=variables,
        cwd=CHECKOUT if block.remark == "run in the checkout" else folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nREADME.md:{block.line} failed with status {done.returncode}")
    return done.stdout


def main() -> None:
    """Run all blocks of the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", type=Path, required=True, help="a virtual environment")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    settings = parser.parse_args()
    printed, was_run = "", False
    for block in blocks((CHECKOUT / "README.md").read_text(encoding="utf-8")):
        if block.language == "text":
            if was_run and (missing := missing_words(block.code, printed)):
                sys.exit(f"{printed}\nREADME.md:{block.line} shows {missing}, which was not printed")
            continue
        was_run = not block.remark.startswith("not run")
        if not was_run:
            print(f"README.md:{block.line}: {block.remark}", flush=True)
            continue
        if file := SAVED_AS.fullmatch(block.remark):
            (settings.folder / file[1]).write_text(block.code, encoding="utf-8")
            continue
        print(block.code.rstrip(), flush=True)
        start = time.monotonic()
        printed = run(block, settings.environment.absolute(), settings.folder.absolute())
        print(f"    {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
