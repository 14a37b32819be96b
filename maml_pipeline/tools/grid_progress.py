"""What a person sees while a grid is trained: the cell at hand, and the time left for all."""

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from maml_pipeline.tools.grid import Cell

SECONDS_BETWEEN_LINES = 60.0


class GridProgress:
    """A bar on a terminal; elsewhere a line for every event, and one a minute.

    The time left assumes that passes over the network take the same time in every cell.

    Args:
        cells: Those that are still to be trained.
        max_steps: Meta-steps of each.
        console: Where to write.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        cells: list[Cell],
        max_steps: int,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cells = cells
        self.max_steps = max_steps
        self.console = console
        self.clock = clock
        self.began = self.last_line = clock()
        self.total = sum(cell.weight for cell in cells) * max_steps
        self.passes_before = 0.0
        self.passes_resumed = 0.0
        self.bars = Progress(
            *(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()),
            TextColumn("{task.fields[left]} left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.bar = self.bars.add_task("", total=self.total, left="?")

    def start(self, cell: Cell, meta_steps: int) -> None:
        """Say that a cell begins, or goes on from so many meta-steps."""
        self.cell, self.cell_began, self.meta_steps = cell, self.clock(), meta_steps
        self.passes_resumed += meta_steps * cell.weight
        self._say(f"goes on from meta-step {meta_steps}" if meta_steps else "started")

    def watch(self, meta_steps: int) -> None:
        """Show how far the cell is."""
        self.meta_steps = max(self.meta_steps, meta_steps)
        done = f"{self.meta_steps:,} of {self.max_steps:,} meta-steps"
        passes = self.passes_before + self.meta_steps * self.cell.weight
        description = f"{self._number()} {self.cell.name}: {done}"
        self.bars.update(self.bar, completed=passes, description=description, left=self.time_left())
        now = self.clock()
        if not self.console.is_terminal and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self._say(f"{done}, {self.time_left()} left for all")

    def end(self, failure: str | None) -> None:
        """Say how a cell ended."""
        self.passes_before += self.max_steps * self.cell.weight
        took = timedelta(seconds=round(self.clock() - self.cell_began))
        self._say(f"failed: {failure}" if failure else f"finished in {took}")

    def time_left(self) -> str:
        """Estimate how long all cells still take, as `h:mm:ss`; `?` while nothing is known."""
        passes = self.passes_before + self.meta_steps * self.cell.weight
        computed = passes - self.passes_resumed
        if computed <= 0:
            return "?"
        seconds = (self.total - passes) * (self.clock() - self.began) / computed
        return str(timedelta(seconds=round(seconds)))

    def _number(self) -> str:
        return f"[{self.cells.index(self.cell) + 1}/{len(self.cells)}]"

    def _say(self, what: str) -> None:
        self.last_line = self.clock()
        self.console.print(
            f"{self._number()} {self.cell.name}: {what}", highlight=False, markup=False, soft_wrap=True
        )
