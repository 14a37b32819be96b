"""The trade-off that the arguments of `maml tradeoff` or `maml submit --tradeoff` describe."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytorch_lightning.cli import LightningArgumentParser

from maml_pipeline.cli.best_of import Search
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.cli.vary import varied_settings_of
from maml_pipeline.config_file import read_config
from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import DEFAULT_ORDERS
from maml_pipeline.run_folder import RUNS
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import SET_BY_TRADEOFF, Cell, make_grid


class Plan:
    """The trade-off that arguments describe: checked, with nothing written yet.

    Args:
        settings: The parsed arguments of `maml tradeoff`.
        fit_arguments: Its other arguments, which are those of `maml fit`.
        elsewhere: Whether the cells will be trained on other machines.

    Attributes:
        notes: What `--best_of` chose, in lines to print.

    Raises:
        UserError: An argument is invalid, or the folder holds another trade-off.
    """

    def __init__(
        self, settings: argparse.Namespace, fit_arguments: Sequence[str], elsewhere: bool = False
    ) -> None:
        _check_fit_arguments(fit_arguments)
        config = _SharedConfig(fit_arguments, elsewhere).values
        self.notes: list[str] = []
        if settings.best_of is None:
            cells = make_grid(
                settings.orders or [*map(str, DEFAULT_ORDERS)],
                settings.inner_steps or [config["model"]["inner_steps"]],
                settings.seeds or [config["seed_everything"]],
                varied_settings_of(settings.vary, fit_arguments, elsewhere),
            )
        else:
            cells = self._cells_at_their_best(settings, config)
        # The cells read it from the shared config: a report chooses among the values of these keys.
        config["run"]["varied"] = [*cells[0].varied] or None
        if config["trainer"]["max_steps"] < 1:
            raise UserError("trainer.max_steps is -1; a trade-off needs a number of meta-steps")
        self.experiment: str = config["run"]["experiment"]
        self.tradeoff = Tradeoff(settings.out or RUNS / f"{self.experiment}-tradeoff", cells)
        if settings.cell is not None:
            self.tradeoff.cell(settings.cell)
        exists = self.tradeoff.config.exists()
        if not settings.report:
            name = "the configuration of the trade-off"
            existing = read_config(self.tradeoff.config, name) if exists else None
            self.shared: dict[str, Any] = self.tradeoff.shared_config(config, existing)
        elif not exists:
            raise UserError(f"out {self.tradeoff.folder} holds no trade-off; train its cells first")

    def _cells_at_their_best(
        self, settings: argparse.Namespace, config: Mapping[str, Any]
    ) -> list[Cell]:
        """Return cells with the values that validated best in another trade-off, and note the values."""
        search = Search(settings.best_of)
        search.check(config)
        grid = make_grid(
            settings.orders or search.orders,
            settings.inner_steps or search.inner_steps,
            settings.seeds or [config["seed_everything"]],
        )
        kinds = dict.fromkeys((cell.order, cell.inner_steps) for cell in grid)
        chosen = {kind: search.chosen(*kind) for kind in kinds}
        self.notes = search.describe(chosen)
        return [replace(cell, varied=chosen[cell.order, cell.inner_steps]) for cell in grid]


def _check_fit_arguments(arguments: Sequence[str]) -> None:
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and key in SET_BY_TRADEOFF:
            raise UserError(
                f"--{key} is set by the trade-off for each cell; use --{SET_BY_TRADEOFF[key]}"
            )


class _SharedConfig(ResolvedConfig):
    """The configuration that all cells share; each cell finds its own checkpoint."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a checkpoint, also one in a config, before it is looked for."""
        super().parse_arguments(parser, args)
        if self.settings.ckpt_path is not None:
            raise UserError("--ckpt_path is not used here: the same command resumes a stopped trade-off")
