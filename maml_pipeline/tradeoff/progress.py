"""What a person sees while a grid is trained: the cell at hand, and the time left for all."""

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import fmean, linear_regression

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from maml_pipeline.text import printable
from maml_pipeline.tradeoff.grid import Cell

SECONDS_BETWEEN_LINES = 60.0


class GridProgress:
    """A bar on a terminal; elsewhere a line for every event, and one a minute.

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
        self.last_line = clock()
        self.number = -1
        self.took: list[tuple[int, float]] = []  # weight and seconds of cells trained from their start
        self.bars = Progress(
            *(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()),
            TextColumn("{task.fields[left]} left for all", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.bar = self.bars.add_task("", total=len(cells), left="?")

    @property
    def cell(self) -> Cell:
        """The one that is trained now."""
        return self.cells[self.number]

    def start(self, meta_steps: int) -> None:
        """Say that the next cell begins, or goes on from so many meta-steps."""
        self.number += 1
        self.began, self.first_steps, self.meta_steps = self.clock(), meta_steps, meta_steps
        self._say(f"goes on after {meta_steps:,} meta-steps" if meta_steps else "started")

    def watch(self, meta_steps: int) -> None:
        """Show how far the cell is."""
        self.meta_steps = min(max(self.meta_steps, meta_steps), self.max_steps)
        done = f"{self.meta_steps:,} of {self.max_steps:,} meta-steps"
        self.bars.update(
            self.bar,
            completed=self.number + self.meta_steps / self.max_steps,
            description=f"{self._place()} {self.cell.name}: {done}",
            left=self.time_left(),
        )
        if not self.console.is_terminal and self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._say(f"{done}, {self.time_left()} left for all")

    def end(self, failure: str | None) -> None:
        """Say how the cell ended."""
        took = self.clock() - self.began
        if failure is None and self.first_steps == 0:
            self.took.append((self.cell.weight, took))
        self._say(f"failed: {failure}" if failure else f"finished in {timedelta(seconds=round(took))}")

    def time_left(self) -> str:
        """Estimate how long all cells still take, as `h:mm:ss`; `?` while nothing is known."""
        done = (self.meta_steps - self.first_steps) / self.max_steps
        elapsed = self.clock() - self.began
        weights = [weight for weight, _ in self.took]
        if len(set(weights)) > 1:
            line = linear_regression(weights, [seconds for _, seconds in self.took])
            slope, start = max(line.slope, 0.0), max(line.intercept, 0.0)
        elif self.took:
            slope, start = fmean(seconds for _, seconds in self.took) / weights[0], 0.0
        elif done > 0:
            slope, start = elapsed / done / self.cell.weight, 0.0
        else:
            return "?"
        missing = 1 - self.first_steps / self.max_steps
        this = max(0.0, missing * (start + slope * self.cell.weight) - elapsed)
        later = sum(start + slope * cell.weight for cell in self.cells[self.number + 1 :])
        return str(timedelta(seconds=round(this + later)))

    def _place(self) -> str:
        return f"[{self.number + 1}/{len(self.cells)}]"

    def _say(self, what: str) -> None:
        self.last_line = self.clock()
        line = printable(f"{self._place()} {self.cell.name}: {what}")
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
