"""Train every gradient order at its own best inner learning rate, and draw the README's first picture.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.reproduce.map                # all of it
    python -m scripts.reproduce.map --only sine    # one experiment
    python -m scripts.reproduce.map --draw         # nothing is trained
    python -m scripts.reproduce.map --tiny         # a trial

For each experiment a search trains every order with several values of alpha for a short time; then every
order is trained for the whole time, with the alpha that validated best. What is finished is not trained
again: after an interruption, the same command resumes.

Writes results/map.json from the final runs on disk, where what was trained elsewhere stays, draws
docs/tradeoff.png where both experiments are finished, and prints the table of docs/results.md, which
tests/test_map.py compares with results/map.json.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maml_pipeline.files import write_atomically
from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.gain import share_of_gain
from maml_pipeline.report.page import render_figure
from maml_pipeline.report.table import ratio_text
from maml_pipeline.report.tradeoff_plot import draw_overview
from maml_pipeline.varied import value_text
from scripts.reproduce.places import parse_places
from scripts.reproduce.results import rows_of, search_of
from scripts.reproduce.tables import ALPHA, result_text
from scripts.reproduce.training import INNER_LR, Training, read_origin

PICTURE = Path("docs/tradeoff.png")

TINY = (
    *("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--probes.every=10"),
    *("--data.val_tasks=10", "--data.test_tasks=20", "--data.meta_batch_size=2"),
)


ORDERS = ("first", "truncated-1", "truncated-2", "second", "checkpointed", "hessian-free")

EXPERIMENTS = [
    Training(
        name="sine",
        task="sine, 10 shots",
        methods=dict(zip(ORDERS, ORDERS, strict=True)),
        flags=(
            *("--config=sine", "--config=cpu", "--inner_steps=5", "--model.eval_inner_steps=5"),
            "--trainer.val_check_interval=1000",
        ),
        search=(f"--vary={INNER_LR}=0.001,0.003,0.01,0.03", "--trainer.max_steps=4000"),
        final=("--seeds=0,1", "--trainer.max_steps=20000"),
        tiny=TINY,
    ),
    Training(
        name="omniglot",
        task="Omniglot 20-way 1-shot",
        methods=dict(zip(ORDERS, ORDERS, strict=True)),
        flags=(
            *("--config=omniglot/20way_1shot", "--config=cpu", "--inner_steps=5"),
            *("--model.eval_inner_steps=5", "--trainer.val_check_interval=100"),
            *("--data.meta_batch_size=8", "--probes.every=100"),
        ),
        search=(f"--vary={INNER_LR}=0.1,0.3,1.0,3.0", "--trainer.max_steps=100"),
        final=("--seeds=0", "--trainer.max_steps=600"),
        tiny=TINY,
        threads=2,
    ),
]
"""The panels of the picture. Final runs follow one another, so that their times can be compared."""


def result(experiment: Training, runs: Path) -> dict[str, Any]:
    """Return what `results/map.json` holds of an experiment: its rows, and how they came about."""
    folder = runs / experiment.name
    rows = rows_of(folder)
    return {
        "title": experiment.task,
        "origin": read_origin(folder),
        "meta_steps": rows[0].runs[0].max_steps,
        "search": search_of(experiment.search_folder(runs)),
        "rows": [{**row.to_json(), **_texts(row, rows)} for row in rows],
    }


def _texts(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    result = row.to_json()
    return {
        "label": row.order.label,
        "share_of_gain": share_of_gain(row, rows),
        "result": result_text(result["measure"], result),
        **{f"{cost}_ratio": ratio_text(row, cost) for cost in ("peak_bytes", "meta_step_ms")},
    }


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/results.md.

    Args:
        results: What `results/map.json` holds.
    """
    heading = (
        "task",
        "order",
        f"best {ALPHA}",
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
                value_text(row["varied"][INNER_LR]),
                row["result"],
                "-" if share is None else f"{round(100 * share)} %",
                *("1" if ratio == "-" else f"{ratio} ×" for ratio in ratios),  # noqa: RUF001
            )
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> None:
    """Train what is not finished, and write the results, the picture and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", choices=names, help="train one experiment")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    settings, places = parse_places(parser, Path("runs/map"), "map.json")
    for experiment in EXPERIMENTS:
        if settings.only in (None, experiment.name) and not settings.draw:
            experiment.train(places.runs, places.is_trial)
    finished = [experiment for experiment in EXPERIMENTS if experiment.is_finished(places.runs)]
    earlier = json.loads(places.results.read_text()) if places.results.exists() else {}
    results = earlier | {each.name: result(each, places.runs) for each in finished}
    results = {name: results[name] for name in names if name in results}
    places.write(results)
    if finished == EXPERIMENTS:
        figure = draw_overview({each.task: rows_of(places.runs / each.name) for each in finished})
        write_atomically(places.picture(PICTURE), render_figure(figure, "png"))
    print(table(results))


if __name__ == "__main__":
    main()
