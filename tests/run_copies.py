"""Changed copies of a run's folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Change = Callable[[Path], object]
"""Change the files of a run in its folder."""

BINARY = bytes(range(256)) * 40


def copy_run(run: Path, folder: Path, change: Change = lambda _: None, seed: int = 17) -> Path:
    """Copy a run without its checkpoints, with another seed, and apply a change to the copy."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"), symlinks=True)
    config("seed_everything", seed)(folder)
    change(folder)
    return folder


def write(name: str, content: str | bytes) -> Change:
    """Write a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data)


def edit(name: str, change: Callable[[str], str]) -> Change:
    """Change the text of a file."""
    return lambda run: (run / name).write_text(change((run / name).read_text()))


def config(key: str, value: Any) -> Change:
    """Set a key of config.yaml; `...` removes it."""

    def change_run(run: Path) -> None:
        whole = yaml.safe_load((run / "config.yaml").read_text())
        *parents, last = key.split(".")
        inner = whole
        for parent in parents:
            inner = inner[parent]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        (run / "config.yaml").write_text(yaml.safe_dump(whole))

    return change_run


def result(**changes: Any) -> Change:
    """Set metrics of test.json; `...` removes one."""

    def change_run(run: Path) -> None:
        whole = json.loads((run / "test.json").read_text())
        whole |= {f"test/{key}": value for key, value in changes.items()}
        whole = {key: value for key, value in whole.items() if value is not ...}
        (run / "test.json").write_text(json.dumps(whole))

    return change_run


def metric(line: int, column: str, cell: str) -> Change:
    """Set a cell of metrics.csv."""

    def change(table: str) -> str:
        lines = table.splitlines()
        cells = lines[line].split(",")
        cells[lines[0].split(",").index(column)] = cell
        lines[line] = ",".join(cells)
        return "\n".join(lines) + "\n"

    return edit("metrics.csv", change)


def remove(name: str) -> Change:
    """Remove a file or a folder."""
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def replace(name: str, make: Callable[[Path], object]) -> Change:
    """Replace a file or a folder."""

    def change_run(run: Path) -> None:
        remove(name)(run)
        make(run / name)

    return change_run


def replace_folder(make: Callable[[Path], object]) -> Change:
    """Replace the whole folder."""

    def change_run(run: Path) -> None:
        shutil.rmtree(run)
        make(run)

    return change_run


def sparse(size: int) -> Callable[[Path], None]:
    """Create a sparse file of some size in bytes."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


def only_wandb_log(content: Callable[[bytes], bytes]) -> Change:
    """Keep only W&B's log, and change its content."""

    def change_run(run: Path) -> None:
        (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
        data = content(log.read_bytes())
        shutil.rmtree(run)
        log.parent.mkdir(parents=True)
        log.write_bytes(data)

    return change_run


def only_tradeoff_json(content: str | bytes) -> Change:
    """Keep no file but a tradeoff.json."""

    def change_run(run: Path) -> None:
        shutil.rmtree(run)
        run.mkdir()
        write("tradeoff.json", content)(run)

    return change_run


def each(*changes: Change) -> Change:
    """Apply several changes in order."""

    def change_run(run: Path) -> None:
        for one in changes:
            one(run)

    return change_run
