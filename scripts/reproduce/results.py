"""Rows of results/*.json: how they come from the runs of a `Training`, and are kept."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from maml_pipeline import run_folder
from maml_pipeline.files import write_atomically
from maml_pipeline.learner.checkpoints import load_checkpoint
from maml_pipeline.report.comparison import ComparisonRow, compare
from maml_pipeline.report.curves import series_over_seeds
from maml_pipeline.report.page import render_figure
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Estimate, Run, finite, mean
from maml_pipeline.varied import value_text
from scripts.reproduce.places import Places, parse_places
from scripts.reproduce.tables import table
from scripts.reproduce.training import INNER_LR, Training, read_origin


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
    named = {"training": training.name, "task": training.task}
    return [{**named, **_row(row, training), **search, **origin} for row in rows]


def merged_results(trainings: Sequence[Training], runs: Path, file: Path) -> list[dict[str, Any]]:
    """Return the results of all trainings: of those that are not finished here, what a file has.

    Args:
        trainings: In the order of the results.
        runs: Where the runs are.
        file: Results of earlier runs, perhaps on another machine; need not exist.
    """
    earlier = read_results(file) if file.exists() else []
    results = []
    for training in trainings:
        if training.is_finished(runs):
            results += results_of(training, runs)
        else:
            results += [row for row in earlier if row.get("training") == training.name]
    return results


def draw_if_complete(
    places: Places,
    trainings: Sequence[Training],
    picture: Path,
    draw: Callable[[Sequence[Mapping[str, Any]]], Figure],
) -> None:
    """Draw a picture of the results, if there are those of all trainings.

    Args:
        places: Where the results are.
        trainings: Those of the picture.
        picture: Where to draw it, unless the results are elsewhere.
        draw: Draws the rows of results.
    """
    results = read_results(places.results)
    if {training.name for training in trainings} <= {row["training"] for row in results}:
        write_atomically(places.picture(picture), render_figure(draw(results), "png"))


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of results."""
    return list(json.loads(file.read_text()))


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
        "order": str(row.order),
        "method": label,
        "measure": row.runs[0].measure_at_test[0],
        "inner_lr": config["model"]["inner_lr"],
        "inner_steps": row.inner_steps,
        "monitor": row.runs[0].monitor,
        "meta_steps": row.runs[0].max_steps,
        "meta_batch_size": config["data"]["meta_batch_size"],
        "best_meta_steps": [best_meta_step(run) for run in row.evaluated],
        "seeds": [run.seed for run in row.evaluated],
        "diverged_seeds": sorted(run.seed for run in row.unfinished),
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
) -> Places:
    """Train what is not finished, write the results, and print their table.

    Args:
        description: For `--help`.
        trainings: What stands in the table.
        steps: As for `table`.
        file: Name of the results' file.

    Returns:
        Where the runs and the results are.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [training.name for training in trainings]
    parser.add_argument("--only", choices=names, help="train one of them")
    parser.add_argument("--read", action="store_true", help="train nothing; read what is finished")
    settings, places = parse_places(parser, Path("runs/reproduce"), file)
    for training in trainings:
        if settings.only in (None, training.name) and not settings.read:
            training.train(places.runs, places.is_trial)
    results = merged_results(trainings, places.runs, places.results)
    places.write(results)
    print(table(results, steps))
    return places
