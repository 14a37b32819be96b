"""What the scripts of this folder share: training with `maml`, and rows of results with their origin."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maml_pipeline import run_folder
from maml_pipeline.files import write_atomically
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.learner.tracking.description import device_name, git_state
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.curves import series_over_seeds
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Estimate, Run, finite, mean
from maml_pipeline.varied import value_text
from scripts.reproduce.tables import table

INNER_LR = "model.inner_lr"

ORIGIN = "origin.json"
"""In the folder of a trade-off: when, where and from which commit it was trained."""


@dataclass(frozen=True)
class Training:
    """A trade-off whose rows stand in a table, perhaps with a search before it.

    Args:
        name: Of its folder.
        task: In the first column.
        methods: Label of each order that is trained.
        flags: Of `maml tradeoff`, without orders and folder.
        search: Further flags of a shorter trade-off that chooses the values of the keys that it varies,
            for each order; without any there is no search.
        final: Further flags of the trade-off itself.
        tiny: Further flags of both that make them as short as possible.
        published: Results in print of each label, by number of inner steps.
        threads: PyTorch's threads in each process, except for the search: two cells at a time share
            two cores there.
    """

    name: str
    task: str
    methods: Mapping[str, str]
    flags: Sequence[str]
    search: Sequence[str] = ()
    final: Sequence[str] = ()
    tiny: Sequence[str] = ()
    published: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    threads: int = 1

    def search_command(self, runs: Path, tiny: bool = False) -> list[str]:
        """Return the command of the search after `maml`; empty if there is none."""
        # The test results of the search are not used.
        short = ("--seeds=0", "--parallel=2", "--data.test_tasks=10")
        flags = (*self.search, *short, f"--out={self.search_folder(runs)}")
        return self._command(flags, tiny) if self.search else []

    def command(self, runs: Path, tiny: bool = False) -> list[str]:
        """Return the command of the trade-off itself after `maml`."""
        best = (f"--best_of={self.search_folder(runs)}",) if self.search else ()
        return self._command((*best, *self.final, f"--out={runs / self.name}"), tiny)

    def search_folder(self, runs: Path) -> Path:
        """Return the folder of the search."""
        return runs / f"{self.name}-search"

    def _command(self, flags: Sequence[str], tiny: bool) -> list[str]:
        orders = f"--orders={','.join(self.methods)}"
        return ["tradeoff", *self.flags, orders, *flags, *(self.tiny if tiny else ())]

    def train(self, runs: Path, tiny: bool = False) -> None:
        """Train what is not finished; what was stopped resumes."""
        if search := self.search_command(runs, tiny):
            run_maml(search, threads=1, check=False)  # a run with a large rate may diverge
        run_maml(self.command(runs, tiny), self.threads)
        write_origin(runs / self.name, self.threads)

    def is_finished(self, runs: Path) -> bool:
        """Tell whether there are results."""
        return (runs / self.name / ORIGIN).exists()


def run_maml(arguments: Sequence[str], threads: int, check: bool = True) -> None:
    """Run `maml` in a process of its own, and show the command.

    Args:
        arguments: After `maml`.
        threads: PyTorch's threads.
        check: Exit with its status if it fails.
    """
    print("maml", *arguments, flush=True)
    command = [sys.executable, "-m", "maml_pipeline", *arguments]
    status = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    if check and status:
        sys.exit(status)


def write_origin(folder: Path, threads: int) -> None:
    """Write down where a trade-off was trained, unless that is known from when it was first finished."""
    if not (folder / ORIGIN).exists():
        found = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "threads": threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": (git_state(Path(__file__).parent) or {}).get("commit"),
        }
        write_atomically(folder / ORIGIN, json.dumps(found, indent=1) + "\n")


def read_origin(folder: Path) -> dict[str, Any]:
    """Return what `write_origin` wrote."""
    return dict(json.loads((folder / ORIGIN).read_text()))


def rows_of(folder: Path) -> list[ComparisonRow]:
    """Return the comparison of the runs in the folder of one trade-off."""
    (rows,) = compare(find_runs([folder]).runs).values()
    return rows


def results_of(training: Training, runs: Path) -> list[dict[str, Any]]:
    """Return what is kept of a training: for each order, that of the value which validated best."""
    folder = runs / training.name
    rows = [row for row in rows_of(folder) if not row.is_outdone]
    origin = read_origin(folder)
    searched = training.search_folder(runs) if training.search else folder
    search = {"search": search_of(searched)} if varied_values(searched) else {}
    return [{"task": training.task, **_row(row, training), **search, **origin} for row in rows]


def varied_values(folder: Path) -> list[float]:
    """Return the inner learning rates of a trade-off; empty if it does not vary them."""
    varied = json.loads((folder / "tradeoff.json").read_text())["varied"] or {}
    return list(varied.get(INNER_LR, ()))


def search_of(folder: Path) -> dict[str, Any]:
    """Return what is kept of a search of inner learning rates: the best validation result of each."""
    rows = rows_of(folder)
    return {
        "meta_steps": rows[0].runs[0].max_steps,
        "values": varied_values(folder),
        "validation": {
            str(order): {value_text(r.setting[INNER_LR]): r.validation for r in rows if r.order == order}
            for order in dict.fromkeys(row.order for row in rows)
        },
    }


def _row(row: ComparisonRow, training: Training) -> dict[str, Any]:
    config, label = row.runs[0].config, training.methods[str(row.order)]
    published = training.published.get(label, {})
    curves = [run.test_curve for run in row.evaluated]
    return {
        "method": label,
        "measure": row.runs[0].measure_at_test[0],
        "inner_lr": config["model"]["inner_lr"],
        "inner_steps": row.inner_steps,
        "monitor": row.runs[0].monitor,
        "meta_steps": row.runs[0].max_steps,
        "meta_batch_size": config["data"]["meta_batch_size"],
        "best_meta_steps": [best_meta_step(run) for run in row.evaluated],
        "seeds": [run.seed for run in row.evaluated],
        "test_tasks": config["data"]["test_tasks"],
        "transductive": config["model"]["transductive"],
        "result": {str(k): _estimate(curve) for k, curve in enumerate(zip(*curves, strict=True))},
        "published": {str(k): value for k, value in published.items()},
        "seconds": [training_seconds(run) for run in row.evaluated],
        "validation": _curve(row),
        "peak_bytes": finite(row.mean("peak_bytes")),
        "meta_step_ms": finite(row.mean("meta_step_ms")),
    }


def _curve(row: ComparisonRow) -> dict[str, list[float]]:
    """Return the mean over seeds of the monitored metric, at no more than eighty meta-steps."""
    series = series_over_seeds(row.runs, row.runs[0].monitor)
    return {"meta_steps": series.steps, "mean": [round(value, 5) for value in series.means]}


def _estimate(of_seeds: Sequence[Estimate]) -> dict[str, Any]:
    """Return the mean over seeds, and of their intervals, as reports do, and the mean of each seed."""
    means = [each.mean for each in of_seeds]
    ci95 = mean([each.ci95 for each in of_seeds])
    return {"mean": finite(mean(means)), "ci95": finite(ci95), "of_seeds": [finite(m) for m in means]}


def training_seconds(run: Run) -> float:
    """Return how long a run trained, validations included."""
    last = load_checkpoint(run_folder.checkpoint_path(run.source, "last"))
    return float(last["callbacks"]["TrainingTime"]["seconds"])


def best_meta_step(run: Run) -> int:
    """Return how many meta-steps the tested checkpoint had taken."""
    return int(load_checkpoint(run_folder.checkpoint_to_test(run.source))["global_step"])


def reproduce(
    description: str, trainings: Sequence[Training], steps: Sequence[int], file: str
) -> Path | None:
    """Train what is not finished, write the results, and print their table.

    Args:
        description: For `--help`.
        trainings: What stands in the table.
        steps: As for `table`.
        file: Name of the results' file.

    Returns:
        The folder of the runs; `None` for a trial, whose results are not to be published.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [training.name for training in trainings]
    parser.add_argument("--only", choices=names, help="train one of them")
    parser.add_argument("--read", action="store_true", help="train nothing; read what is finished")
    parser.add_argument("--tiny", action="store_true", help="as few meta-steps as possible")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("results", file))
    settings = parser.parse_args()
    chosen = [each for each in trainings if settings.only in (None, each.name) and not settings.read]
    for training in chosen:
        training.train(settings.runs, settings.tiny)
    finished = [training for training in trainings if training.is_finished(settings.runs)]
    results = [row for training in finished for row in results_of(training, settings.runs)]
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.results, json.dumps(results, indent=1) + "\n")
    print(table(results, steps))
    return None if settings.tiny else Path(settings.runs)
