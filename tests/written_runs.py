"""Folders of runs that were written by hand and never trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.runs.summary import summarize
from tests.helpers import make_run


def order_settings(name: str) -> dict[str, Any]:
    """Return the keys of `model` for a gradient order."""
    order = GradientOrder.parse(name)
    steps, method = order.differentiated_steps, str(order.method)
    return {"first_order": order.first_order, "differentiated_steps": steps, "method": method}


def write_run(
    folder: Path,
    order: str = "second",
    k: int = 1,
    seed: int = 0,
    *,
    experiment: str = "sine",
    measure: str = "loss",
    result: float | None = 0.25,
    done: int = 100,
    **model: Any,
) -> Path:
    """Write the folder of a run.

    Args:
        folder: Its folder.
        order: Such as `first`, `truncated-2` or `checkpointed`.
        k: Inner steps.
        seed: Its seed.
        experiment: Its experiment.
        measure: `loss` (lower is better) or another measure (higher is better).
        result: The measure on the test tasks; `None` for a run that is not tested.
        done: Meta-steps done of 100; 0 for a run that has logged nothing.
        model: Further keys of `model`.
    """
    network = {"class_path": "maml_pipeline.networks.MLP", "init_args": {"hidden_features": [40, 40]}}
    settings = {"inner_lr": 0.1, "inner_steps": k, "network": network, "metric": None}
    config = {
        "seed_everything": seed,
        "model": {**settings, **order_settings(order), **model},
        "data": {"tasks": {"class_path": "maml_pipeline.tasks.SineWaves", "init_args": {"shots": 10}}},
        "trainer": {"max_steps": 100, "precision": None},
        "run": {
            "experiment": experiment,
            "monitor": f"val/{measure}",
            "mode": "min" if measure == "loss" else "max",
        },
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if done:
        header = f"step,val/{measure},val/{measure}_ci95"
        (folder / "metrics.csv").write_text(f"{header}\n{done - 1},0.75,0.125\n")
    if result is not None:
        test = {f"test/{measure}": result, f"test/{measure}_ci95": 0.0625}
        (folder / "test.json").write_text(json.dumps(test))
    return folder


def write_search(
    folder: Path,
    validations: Mapping[str, Mapping[float, float]],
    inner_steps: int = 1,
    experiment: str = "toy",
) -> None:
    """Write the summary of a trade-off that varied the inner learning rate.

    Args:
        folder: Its folder.
        validations: The best validation loss by order and rate; test results are in the opposite order.
        inner_steps: Inner steps of all runs.
        experiment: Their experiment.
    """
    cells = [
        summarize(
            make_run(
                GradientOrder.parse(order),
                inner_steps,
                result=-validation,
                history=[{"step": 9, "val/loss": validation}],
                varied={"model.inner_lr": rate},
                experiment=experiment,
            )
        )
        for order, by_rate in validations.items()
        for rate, validation in by_rate.items()
    ]
    folder.mkdir(parents=True)
    (folder / "tradeoff.json").write_text(json.dumps({"cells": cells}))
