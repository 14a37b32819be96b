"""Choosing, for each order and number of inner steps, the varied setting that validated best.

Orders are compared fairly only if each has its own best setting, such as its own inner learning rate.
Test results play no part in the choice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.runs.run import Run, mean
from maml_pipeline.runs.state import has_diverged
from maml_pipeline.varied import identity, sort_key

Setting = Mapping[str, Any]
"""The values of the varied keys, by key."""


@dataclass(frozen=True)
class Choice:
    """How the settings of one order and number of inner steps validated, and which one was chosen.

    Only finished runs count. Settings are compared on the seeds that they all have.

    Args:
        order: The gradient order and its method.
        inner_steps: Inner steps in training.
        chosen: The setting with the best validation result; `None` if none could be chosen.
        scores: The best validation result of each compared setting, averaged over `seeds`, by identity.
        seeds: The seeds on which the settings were compared.
        tied: Other settings with the same validation result, which is a matter of exact equality.
        diverged: Settings with a validation result that is not finite, or a run that stopped at a loss
            that is not.
        unvalidated: Settings of which a finished run has no validation result.
        unfinished: Settings without a finished run.
        missing_seeds: Seeds that were not compared, each with the settings that have not finished it.
    """

    order: GradientOrder
    inner_steps: int
    chosen: Setting | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    tied: Sequence[Setting] = ()
    diverged: Sequence[Setting] = ()
    unvalidated: Sequence[Setting] = ()
    unfinished: Sequence[Setting] = ()
    missing_seeds: Mapping[int, Sequence[Setting]] = field(default_factory=dict)

    def is_chosen(self, setting: Setting) -> bool | None:
        """Tell whether a setting was chosen; `None` if none was."""
        return None if self.chosen is None else identity(self.chosen) == identity(setting)


def varied_in(runs: Sequence[Run]) -> list[Setting]:
    """Return the settings of the varied keys that occur in some runs, sorted by their values."""
    found = {identity(run.varied): run.varied for run in runs}
    return sorted(found.values(), key=sort_key)


def choose(runs: Sequence[Run], settings: Sequence[Setting]) -> Choice:
    """Choose the setting with the best validation result, averaged over seeds.

    The validation result of a run is the one that selected its `best.ckpt`. Of tied settings, the first
    is chosen.

    Args:
        runs: Those of one order and number of inner steps.
        settings: All settings that any order was trained with, in order.
    """
    finished: dict[str, dict[int, Run]] = {identity(setting): {} for setting in settings}
    for run in runs:
        if run.is_finished:
            finished[identity(run.varied)][run.seed] = run

    def has_result(setting: Setting) -> bool:
        return all(run.best_validation is not None for run in finished[identity(setting)].values())

    diverged = {identity(run.varied) for run in runs if has_diverged(run)}
    unfinished = [s for s in settings if not finished[identity(s)] and identity(s) not in diverged]
    rest = [s for s in settings if finished[identity(s)] and identity(s) not in diverged]
    compared = [setting for setting in rest if has_result(setting)]
    seeds = sorted(set.intersection(*(set(finished[identity(s)]) for s in compared))) if compared else []
    scores = {}
    for setting in compared if seeds else []:
        results = [finished[identity(setting)][seed].best_validation for seed in seeds]
        scores[identity(setting)] = mean([math.nan if r is None else r for r in results])
    sign = -1 if runs[0].higher_is_better else 1
    losses = {key: sign * score for key, score in scores.items() if math.isfinite(score)}
    best = min(losses.values(), default=None)
    equal = [s for s in compared if best is not None and losses.get(identity(s)) == best]
    return Choice(
        runs[0].order,
        runs[0].inner_steps,
        chosen=equal[0] if equal else None,
        scores=scores,
        seeds=seeds,
        tied=equal[1:],
        diverged=[s for s in settings if identity(s) in diverged | (scores.keys() - losses.keys())],
        unvalidated=[setting for setting in rest if not has_result(setting)],
        unfinished=unfinished,
        missing_seeds={
            seed: [s for s in compared if seed not in finished[identity(s)]]
            for seed in sorted({run.seed for run in runs} - {*seeds})
        },
    )
