"""Train every gradient order at its own best inner learning rate, and draw the README's first picture.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.reproduce_map                # all of it
    python -m scripts.reproduce_map --only sine    # one experiment
    python -m scripts.reproduce_map --draw         # nothing is trained
    python -m scripts.reproduce_map --tiny --picture /tmp/map.png --results /tmp/map.json    # a trial

For each experiment a search trains every order with several values of alpha for a short time; then every
order is trained for the whole time, with the alpha that validated best. What is finished is not trained
again: after an interruption, the same command resumes.

Writes docs/tradeoff.png and results/map.json from the final runs on disk, and prints the table of
docs/results.md, which tests/test_map.py compares with results/map.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from maml_pipeline.files import write_atomically
from maml_pipeline.learner.tracking.description import device_name
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.gain import share_of_gain
from maml_pipeline.report.page import render_figure
from maml_pipeline.report.table import ratio_text
from maml_pipeline.report.tradeoff_plot import draw_overview
from maml_pipeline.runs.find import find_runs
from maml_pipeline.text import in_one_notation
from maml_pipeline.varied import value_text

ALPHA = "model.inner_lr"


@dataclass(frozen=True)
class Experiment:
    """What is trained for one panel of the picture.

    Args:
        title: In the table.
        config: Name of the config.
        orders: The orders, as for `maml tradeoff --orders`.
        alphas: The values of the search.
        search_steps: Meta-steps of a run of the search, with seed 0.
        steps: Meta-steps of a final run.
        seeds: Of the final runs.
        threads: PyTorch's threads in a final run; they run one after another, so that times can be
            compared. The runs of the search share two cores.
        flags: Further keys of `maml fit`.
    """

    title: str
    config: str
    orders: str
    alphas: str
    search_steps: int
    steps: int
    seeds: str
    threads: int
    flags: Sequence[str]


EXPERIMENTS = {
    "sine": Experiment(
        title="sine, 10 shots",
        config="sine",
        orders="first,truncated-1,truncated-2,second,checkpointed,hessian-free",
        alphas="0.001,0.003,0.01,0.03",
        search_steps=4000,
        steps=20_000,
        seeds="0,1",
        threads=1,
        flags=("--model.eval_inner_steps=5", "--trainer.val_check_interval=1000"),
    ),
    "omniglot": Experiment(
        title="Omniglot 20-way 1-shot",
        config="omniglot/20way_1shot",
        orders="first,truncated-1,truncated-2,second,checkpointed,hessian-free",
        alphas="0.1,0.3,1.0",
        search_steps=100,
        steps=1000,
        seeds="0",
        threads=2,
        flags=(
            *("--model.eval_inner_steps=5", "--trainer.val_check_interval=100"),
            *("--data.meta_batch_size=8", "--probes.every=100"),
        ),
    ),
}

TINY = {"search_steps": 20, "steps": 40, "alphas": "0.01,0.1"}
TINY_FLAGS = (
    *("--trainer.val_check_interval=10", "--probes.every=20"),
    *("--data.val_tasks=10", "--data.test_tasks=20", "--data.meta_batch_size=2"),
)


def commands(name: str, runs: Path, tiny: bool = False) -> list[tuple[list[str], int]]:
    """Return the commands of an experiment after `maml`, each with its number of threads.

    Args:
        name: A key of `EXPERIMENTS`.
        runs: The folder for all runs.
        tiny: Whether to make the runs as short as possible.
    """
    given = EXPERIMENTS[name]
    settings = {**vars(given), **(TINY if tiny else {})}
    flags = [*given.flags, *(TINY_FLAGS if tiny else ())]
    first = ["tradeoff", f"--config={given.config}", "--config=cpu", "--inner_steps=5", *flags]
    search, final = runs / f"{name}-search", runs / name
    return [
        (
            [
                *(*first, f"--orders={given.orders}", f"--vary={ALPHA}={settings['alphas']}"),
                *(f"--trainer.max_steps={settings['search_steps']}", "--seeds=0", "--parallel=2"),
                # The test results of the search are not used.
                *("--data.test_tasks=10", f"--out={search}"),
            ],
            1,
        ),
        (
            [
                *(*first, f"--best_of={search}", f"--orders={given.orders}", f"--seeds={given.seeds}"),
                *(f"--trainer.max_steps={settings['steps']}", f"--out={final}"),
            ],
            given.threads,
        ),
    ]


def result(name: str, runs: Path) -> dict[str, Any]:
    """Return what `results/map.json` holds of an experiment: its rows, and how they came about."""
    rows = rows_of(runs / name)
    search = rows_of(runs / f"{name}-search")
    summary = json.loads((runs / f"{name}-search" / "tradeoff.json").read_text())
    return {
        "title": EXPERIMENTS[name].title,
        "measured": {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "cpu": device_name(torch.device("cpu")),
            "cores": len(os.sched_getaffinity(0)),
            "threads": EXPERIMENTS[name].threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "meta_steps": rows[0].runs[0].max_steps,
        "search": {
            "meta_steps": search[0].runs[0].max_steps,
            "values": summary["varied"][ALPHA],
            "validation": {
                str(order): {
                    value_text(r.setting[ALPHA]): r.validation for r in search if r.order == order
                }
                for order in dict.fromkeys(row.order for row in search)
            },
        },
        "rows": [{**row.to_json(), **_texts(row, rows)} for row in rows],
    }


def _texts(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    assert row.result is not None
    return {
        "label": row.order.label,
        "share_of_gain": share_of_gain(row, rows),
        "result": " ± ".join(in_one_notation(row.result.mean, row.result.ci95)),
        **{f"{cost}_ratio": ratio_text(row, cost) for cost in ("peak_bytes", "meta_step_ms")},
    }


def rows_of(folder: Path) -> list[ComparisonRow]:
    """Return the comparison of the runs in the folder of one trade-off."""
    (rows,) = compare(find_runs([folder]).runs).values()
    return rows


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/results.md.

    Args:
        results: What `results/map.json` holds.
    """
    heading = (
        "task",
        "order",
        "best α",  # noqa: RUF001
        "test result",
        "share of second order's gain",
        "memory",
        "time",
    )
    lines = [" | ".join(heading), "|".join(["---", "---", *["---:"] * 5])]
    for experiment in results.values():
        for row in experiment["rows"]:
            share = row["share_of_gain"]
            ratios = [row[f"{cost}_ratio"] for cost in ("peak_bytes", "meta_step_ms")]
            cells = (
                experiment["title"],
                row["label"],
                value_text(row["varied"][ALPHA]),
                row["result"],
                "-" if share is None else f"{round(100 * share)} %",
                *("1" if ratio == "-" else f"{ratio} ×" for ratio in ratios),  # noqa: RUF001
            )
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not finished, and write the picture, the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=[*EXPERIMENTS], help="train one experiment")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--tiny", action="store_true", help="as few meta-steps as possible")
    parser.add_argument("--runs", type=Path, default=Path("runs/map"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/tradeoff.png"))
    parser.add_argument("--results", type=Path, default=Path("results/map.json"))
    settings = parser.parse_args(arguments)
    names = [settings.only] if settings.only else [*EXPERIMENTS]
    for name in names if not settings.draw else []:
        for command, threads in commands(name, settings.runs, settings.tiny):
            print("maml", *command, flush=True)
            subprocess.run(
                [sys.executable, "-m", "maml_pipeline", *command],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                check=f"--out={settings.runs / name}" in command,  # a run of a search may diverge
            )
    finished = [name for name in EXPERIMENTS if (settings.runs / name / "tradeoff.json").exists()]
    results = {name: result(name, settings.runs) for name in finished}
    figure = draw_overview({EXPERIMENTS[name].title: rows_of(settings.runs / name) for name in finished})
    for file in (settings.picture, settings.results):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(settings.picture, render_figure(figure, "png"))
    write_atomically(settings.results, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
