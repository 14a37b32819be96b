"""`maml tradeoff --best_of DIR`: the values that validated best in another trade-off."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maml_pipeline.cli.checks.varied import check_may_vary
from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.choice import Setting, varied_in
from maml_pipeline.report.comparison import compare
from maml_pipeline.report.findings import choice_notes
from maml_pipeline.run_config import experiment_name
from maml_pipeline.runs.find import find_runs
from maml_pipeline.text import counted, printable
from maml_pipeline.varied import has_key, setting_text

Chosen = Mapping[tuple[GradientOrder, int], Setting]
"""The chosen values by order and number of inner steps."""


class Search:
    """A trade-off whose varied values have been compared by validation.

    Its budget and seeds may differ from those of the runs that take its values; its tasks may not.

    Args:
        folder: The folder of the trade-off, which `--best_of` names.

    Raises:
        UserError: It holds no runs of a single comparison whose values were varied.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"best_of {printable(folder)}"
        try:
            runs = find_runs([folder]).runs
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        groups = compare(runs)
        if len(groups) > 1:
            raise UserError(
                f"{self.name} holds {len(groups)} comparisons ({', '.join(groups)[:200]}); "
                "name the folder of one trade-off"
            )
        ((_, self.rows),) = groups.items()
        if not self.rows[0].setting:
            raise UserError(f"{self.name} varies no setting; train it with --vary first")
        self.experiment = runs[0].experiment
        self.settings = varied_in(runs)

    @property
    def orders(self) -> list[str]:
        """The names of its orders, from first to second order."""
        return [*dict.fromkeys(str(row.order) for row in self.rows)]

    @property
    def inner_steps(self) -> list[int]:
        """Its numbers of inner steps."""
        return [*dict.fromkeys(row.inner_steps for row in self.rows)]

    def check(self, config: Mapping[str, Any]) -> None:
        """Check that its values can be those of runs with another resolved config.

        Raises:
            UserError: The config is of other tasks, or has no such key.
        """
        if (name := experiment_name({**config})) != self.experiment:
            raise UserError(f"{self.name} is of {printable(self.experiment)}, not of {printable(name)}")
        for key in self.settings[0]:
            check_may_vary(self.name, key)
            if not has_key(config, key):
                raise UserError(f"{self.name} varies {printable(key)}, which this config does not have")

    def chosen(self, order: GradientOrder, inner_steps: int) -> Setting:
        """Return the values that validated best with an order and a number of inner steps.

        Raises:
            UserError: It has no such runs, or nothing could be chosen.
        """
        what = f"{order} with {counted(inner_steps, 'inner step')}"
        found = [r for r in self.rows if r.order == order and r.inner_steps == inner_steps]
        if not found:
            raise UserError(f"{self.name} has no runs of {what}; train them there, or leave it out")
        choice = found[0].choice
        if choice is None:  # a single value, as in a trade-off that was itself trained with --best_of
            is_finished = any(run.is_finished for run in found[0].runs)
            unfinished = [] if is_finished else [found[0].setting]
        else:  # the value that validates best might be among the unfinished ones
            unfinished = [*choice.unfinished]
        if unfinished:
            lacking = "; ".join(printable(setting_text(setting)) for setting in unfinished)
            raise UserError(f"{self.name}: {what} is not finished with {lacking}; train that first")
        if choice is None:
            return found[0].setting
        if choice.chosen is None:
            raise UserError(f"{self.name}: for {what}, validation could choose no value")
        return choice.chosen

    def describe(self, chosen: Chosen) -> list[str]:
        """Return lines that name the chosen values, and what limits the choice."""
        values = "; ".join(
            f"{order.label}, k = {steps}: {printable(setting_text(setting))}"
            for (order, steps), setting in chosen.items()
        )
        notes = choice_notes(self.rows)
        if any(row.choice is not None for row in self.rows):
            del notes[0]  # how values are chosen, which holds for all
        return [f"Best by validation in {printable(self.folder)}: {values}", *notes]
