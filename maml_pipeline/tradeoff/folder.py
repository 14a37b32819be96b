"""The folder of a trade-off: its cells' runs, the config they share, its lock, and its summary."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.files import make_folder, remove_unfinished, write_atomically
from maml_pipeline.locks import AlreadyLockedError, LocksUnsupportedError, acquire_lock
from maml_pipeline.report.comparison import compare
from maml_pipeline.runs.compatibility import config_differences
from maml_pipeline.runs.find import find_runs
from maml_pipeline.runs.run import Run
from maml_pipeline.runs.summary import summarize
from maml_pipeline.tradeoff.grid import SET_BY_TRADEOFF, Cell
from maml_pipeline.varied import config_value, identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tradeoff:
    """A folder with one run per cell, the config that they share, and a summary.

    Args:
        folder: Where the runs are, or will be.
        cells: The grid.
    """

    folder: Path
    cells: Sequence[Cell]

    @property
    def config(self) -> Path:
        """The config that all cells share."""
        return self.folder / run_folder.CONFIG

    @property
    def varied_keys(self) -> list[str]:
        """The keys that the cells vary beside order, inner steps and seed."""
        return [*self.cells[0].varied]

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / cell.name

    def cell(self, index: int) -> Cell:
        """Return a cell by its index.

        Raises:
            UserError: There is none.
        """
        last = len(self.cells) - 1
        if not 0 <= index <= last:
            raise UserError(f"cell is {index}; the cells of this trade-off are 0 to {last}")
        return self.cells[index]

    def is_finished(self, cell: Cell) -> bool:
        """Tell whether a cell is trained and tested; it is not run again."""
        return (self.folder_of(cell) / run_folder.TEST).exists()

    def create(self, config: dict[str, Any]) -> None:
        """Create the folder and write the shared config, unless they exist.

        Cells that start at the same time may each do this: they write the same file, atomically.

        Args:
            config: As returned by `shared_config`.

        Raises:
            UserError: The folder cannot be created.
        """
        make_folder(self.folder, "out")
        if not self.config.exists():
            write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))

    def shared_config(self, config: dict[str, Any], existing: dict[str, Any] | None) -> dict[str, Any]:
        """Return the config that all cells share.

        All cells are tested with the same number of inner steps: `eval_inner_steps`, or the largest
        number in the grid if that is larger.

        Args:
            config: The resolved config that was asked for; its `eval_inner_steps` is set.
            existing: The folder's shared config; `None` for a new folder.

        Raises:
            UserError: The existing config is damaged, or differs from the one asked for.
        """
        model = config["model"]
        if model["eval_inner_steps"] is None:
            model["eval_inner_steps"] = model["inner_steps"]
        asked, largest = model["eval_inner_steps"], max(cell.inner_steps for cell in self.cells)
        model["eval_inner_steps"] = max(asked, largest)
        if existing is None:
            return config
        try:
            kept = int(existing["model"]["eval_inner_steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.config} is damaged: it has no model.eval_inner_steps; name another folder with "
                "--out"
            ) from error
        if asked <= kept >= largest:
            model["eval_inner_steps"] = kept
        self._check_varied_keys(existing)
        for key, here, there in config_differences(config, existing, ignored=self.varied_keys):
            if key not in SET_BY_TRADEOFF:
                raise UserError(
                    f"{self.folder} holds a trade-off in which {key} is {str(there)[:80]}, not "
                    f"{str(here)[:80]}; name another folder with --out"
                )
        return existing

    def _check_varied_keys(self, existing: dict[str, Any]) -> None:
        varied = config_value(existing, "run.varied") or []
        if varied != self.varied_keys:
            there, here = (" and ".join(keys) or "nothing" for keys in (varied, self.varied_keys))
            raise UserError(
                f"{self.folder} holds a trade-off in which --vary has {there}, not {here}; name another "
                "folder with --out"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[list[int]]:
        """Lock the folder for this process and the runs that it starts, which may outlive it.

        Yields:
            The descriptors to pass to the runs.

        Raises:
            UserError: Another process has locked the folder.
        """
        descriptors = self._lock(shared=False)
        try:
            remove_unfinished(self.folder)
            yield descriptors
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def lock_for_cell(self) -> None:
        """Lock the folder against a whole trade-off, but not against other cells.

        The lock is kept across `exec`, until the process ends.

        Raises:
            UserError: A whole trade-off has locked the folder.
        """
        for descriptor in self._lock(shared=True):
            os.set_inheritable(descriptor, True)

    def _lock(self, shared: bool) -> list[int]:
        """Return the descriptor that holds the lock; none on a file system without locks."""
        try:
            return [acquire_lock(self.folder / run_folder.LOCK, shared)]
        except AlreadyLockedError:
            raise UserError(
                f"{self.folder} is in use: another trade-off, or a run that a killed one left "
                "behind, is still running in it; wait for it, or name another folder with --out"
            ) from None
        except LocksUnsupportedError as error:
            logger.warning(
                "%s cannot be locked (%s): make sure that no other process uses it", self.folder, error
            )
            return []

    def write_summary(self, failures: dict[Cell, str]) -> None:
        """Write the summary: the runs, their comparison, and the failures.

        Args:
            failures: The reason for each failed cell.
        """
        runs: list[Run] = []
        if any(map(self.is_finished, self.cells)):
            # A damaged cell must not stop the other runs; the report names it.
            with contextlib.suppress(UserError):
                runs = find_runs([self.folder]).runs
        summary = {
            "varied": {key: [*self._values(key)] for key in self.varied_keys},
            "comparison": [row.to_json() for rows in compare(runs).values() for row in rows],
            "cells": [{"folder": run.source.name, **summarize(run)} for run in runs],
            "failed": [{"folder": cell.name, "reason": reason} for cell, reason in failures.items()],
        }
        write_atomically(self.folder / run_folder.TRADEOFF, json.dumps(summary, indent=1) + "\n")

    def _values(self, key: str) -> Iterator[Any]:
        """Yield each value of a varied key once, in the order of the cells."""
        seen = {identity({key: cell.varied[key]}): cell.varied[key] for cell in self.cells}
        yield from seen.values()
