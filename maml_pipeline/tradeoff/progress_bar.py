"""The progress of a grid: the current cell, and the time left for all cells."""

import time
from collections.abc import Callable
from datetime import timedelta
from statistics import fmean, linear_regression

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from maml_pipeline.text import printable
from maml_pipeline.tradeoff.grid import Cell

SECONDS_BETWEEN_LINES = 60.0
UNKNOWN_TIME = "-:--:--"


class GridProgress:
    """Show a bar on a terminal; otherwise print a line for each event and one per minute.

    Args:
        cells: The cells to train, in order.
        max_steps: Meta-steps of each cell.
        console: Where to write.
        clock: Returns the time in seconds.
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
        self.durations: list[tuple[int, float]] = []
        """Relative cost and seconds of each cell that was trained without interruption."""
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]} left", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        self.bar = self.bars.add_task("", total=len(cells), visible=False, left=UNKNOWN_TIME)

    @property
    def cell(self) -> Cell:
        """The current cell."""
        return self.cells[self.number]

    def start(self, meta_steps: int) -> None:
        """Start the next cell, of which `meta_steps` meta-steps are done."""
        self.number += 1
        self.started_at, self.first_steps, self.meta_steps = self.clock(), meta_steps, meta_steps
        self.seen: list[tuple[int, float]] = []
        """The first and the last number of meta-steps that the cell itself reached, and when."""
        self._print(f"resumes after {meta_steps:,} meta-steps" if meta_steps else "started")
        self._draw()

    def update(self, meta_steps: int) -> None:
        """Report that `meta_steps` meta-steps of the current cell are done."""
        meta_steps = min(meta_steps, self.max_steps)
        if meta_steps > self.meta_steps:
            self.meta_steps = meta_steps
            self.seen = [*self.seen[:1], (meta_steps, self.clock())]
        self._draw()
        if not self.console.is_terminal and self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            done = f"{self.meta_steps:,} of {self.max_steps:,} meta-steps"
            self._print(f"{done}; {self.time_left()} left for all cells")

    def end(self, failure: str | None) -> None:
        """End the current cell, with the reason if it failed."""
        seconds = self.clock() - self.started_at
        if failure is None and self.first_steps == 0:
            self.durations.append((self.cell.relative_cost, seconds))
        self._print(f"failed: {failure}" if failure else f"finished in {_duration(seconds)}")

    def time_left(self) -> str:
        """Estimate the time left for all cells, as `h:mm:ss`; `-:--:--` while it is unknown.

        A cell takes its start-up time and a time proportional to its relative cost. Both are estimated
        from the finished cells, and before there are any from the current cell. There, the time until
        its first meta-step, which includes compilation, counts as start-up.
        """
        later = [cell.relative_cost for cell in self.cells[self.number + 1 :]]
        elapsed = self.clock() - self.started_at
        if self.durations:
            startup, seconds_per_cost = self._fit_durations()
            fraction = 1 - self.first_steps / self.max_steps
            current = fraction * (startup + seconds_per_cost * self.cell.relative_cost) - elapsed
        elif len(self.seen) == 2:
            (first_steps, first_time), (last_steps, last_time) = self.seen
            seconds_per_step = (last_time - first_time) / (last_steps - first_steps)
            startup = first_time - self.started_at
            seconds_per_cost = seconds_per_step * self.max_steps / self.cell.relative_cost
            current = seconds_per_step * (self.max_steps - last_steps) - (self.clock() - last_time)
        else:
            return UNKNOWN_TIME
        return _duration(max(0.0, current) + sum(startup + seconds_per_cost * cost for cost in later))

    def _fit_durations(self) -> tuple[float, float]:
        """Return the start-up time of a cell, and its further time per relative cost."""
        costs, seconds = zip(*self.durations, strict=True)
        if len(set(costs)) == 1:
            return 0.0, fmean(seconds) / costs[0]
        line = linear_regression(costs, seconds)
        return max(line.intercept, 0.0), max(line.slope, 0.0)

    def _draw(self) -> None:
        self.bars.update(
            self.bar,
            completed=self.number + self.meta_steps / self.max_steps,
            description=f"{self._place()} {self.cell.name} {self.meta_steps:,}/{self.max_steps:,}",
            left=self.time_left(),
            visible=True,
        )

    def _place(self) -> str:
        return f"[{self.number + 1}/{len(self.cells)}]"

    def _print(self, event: str) -> None:
        self.last_line = self.clock()
        line = printable(f"{self._place()} {self.cell.name}: {event}")
        self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
