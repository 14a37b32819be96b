"""The summary of a run in `tradeoff.json`: what a report of the trade-off needs."""

from typing import Any

from maml_pipeline.runs.run import Run, finite
from maml_pipeline.runs.state import has_diverged

SERIES = ("train/loss", "order_gap/cosine", "order_gap/norm_ratio", "order_gap/relative_error")
"""Metrics of which a summary keeps the whole series, besides the monitored one."""


def summarize(run: Run) -> dict[str, Any]:
    """Return what a report needs, as JSON: config, test result, divergence and part of the history."""
    kept = {run.monitor, f"{run.monitor}_ci95", *SERIES}
    latest = {key: value for row in run.history for key, value in row.items()}
    latest |= {} if run.meta_step_ms is None else {"speed/meta_step_ms": run.meta_step_ms}
    thinned = [
        {key: value for key, value in row.items() if key in kept or key == "step"}
        for row in run.history
        if kept & row.keys()
    ]
    final = {k: v for k, v in latest.items() if k.startswith(("memory/", "speed/"))}
    final["step"] = run.meta_steps - 1  # the test is logged at a later step
    history = [_as_json(row) for row in [*thinned, final]]
    return {
        "config": run.config,
        "test": _as_json(run.test),
        "diverged": has_diverged(run),
        "history": history,
    }


def _as_json(record: dict[str, float]) -> dict[str, float | None]:
    return {key: finite(value) for key, value in record.items()}
