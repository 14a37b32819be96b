"""The progress of a grid: the cells that are being trained, and the time left for all cells."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean, linear_regression

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from maml_pipeline.text import printable
from maml_pipeline.tradeoff.grid import Cell

SECONDS_BETWEEN_LINES = 60.0
UNKNOWN_TIME = "-:--:--"


@dataclass
class RunningCell:
    """A cell that is being trained.

    Args:
        number: Its number in the order of starting, from 1.
        started_at: When it started.
        first_steps: Meta-steps that were done before.
        meta_steps: Meta-steps that are done now.
        bar: Its own bar, where several cells are trained side by side.
        seen: The first and the last number of meta-steps that it reached itself, and when.
    """

    number: int
    started_at: float
    first_steps: int
    meta_steps: int
    bar: TaskID | None = None
    seen: list[tuple[int, float]] = field(default_factory=list)


class GridProgress:
    """Show bars on a terminal; otherwise print a line for each event and one per minute.

    One bar shows the cell that is being trained and the progress of the grid. Where several cells are
    trained side by side, each has its own bar below that of the grid.

    Args:
        cells: The cells to train, in the order in which they are started.
        max_steps: Meta-steps of each cell.
        console: Where to write.
        parallel: How many cells are trained side by side.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        max_steps: int,
        console: Console,
        parallel: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cells = cells
        self.max_steps = max_steps
        self.console = console
        self.parallel = parallel
        self.clock = clock
        self.last_line = clock()
        self.running: dict[Cell, RunningCell] = {}
        self.started = 0
        self.ended = 0
        self.durations: list[tuple[int, float]] = []
        """Relative cost and seconds of each cell that was trained without interruption."""
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            expand=True,
        )
        self.bar = self.bars.add_task("", total=len(cells), visible=False, left="")

    def start(self, cell: Cell, meta_steps: int) -> None:
        """Start the next cell, of which `meta_steps` meta-steps are done."""
        self.started += 1
        own = RunningCell(self.started, self.clock(), meta_steps, meta_steps)
        if self.parallel > 1:
            own.bar = self.bars.add_task("", total=self.max_steps, left="")
        self.running[cell] = own
        self._print(cell, f"resumes after {meta_steps:,} meta-steps" if meta_steps else "started")
        self._draw()

    def update(self, cell: Cell, meta_steps: int) -> None:
        """Report that `meta_steps` meta-steps of a cell are done."""
        own, meta_steps = self.running[cell], min(meta_steps, self.max_steps)
        if meta_steps > own.meta_steps:
            own.meta_steps = meta_steps
            own.seen = [*own.seen[:1], (meta_steps, self.clock())]
        self._draw()
        if not self.console.is_terminal and self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._print_progress()

    def end(self, cell: Cell, failure: str | None) -> None:
        """End a cell, with the reason if it failed."""
        own = self.running[cell]
        seconds = self.clock() - own.started_at
        if failure is None and own.first_steps == 0:
            self.durations.append((cell.relative_cost, seconds))
        self._print(cell, f"failed: {failure}" if failure else f"finished in {_duration(seconds)}")
        if own.bar is not None:
            self.bars.remove_task(own.bar)
        del self.running[cell]
        self.ended += 1
        self._draw()

    def time_left(self) -> str:
        """Estimate the time left for all cells, as `h:mm:ss`; `-:--:--` while it is unknown.

        A cell takes its start-up time and a time proportional to its relative cost. Both are estimated
        from the finished cells, and before there are any from those that are being trained. There, the
        time until the first meta-step, counts as start-up. Each waiting
        cell starts when another one ends.
        """
        estimate = self._fit_durations() if self.durations else self._fit_running()
        if estimate is None:
            return UNKNOWN_TIME
        startup, seconds_per_cost = estimate
        ends = [self._seconds_left(cell, own, *estimate) for cell, own in self.running.items()]
        ends += [0.0] * (self.parallel - len(ends))
        heapq.heapify(ends)
        for cell in self.cells[self.started :]:
            heapq.heapreplace(ends, ends[0] + startup + seconds_per_cost * cell.relative_cost)
        return _duration(max(ends))

    def _seconds_left(
        self, cell: Cell, own: RunningCell, startup: float, seconds_per_cost: float
    ) -> float:
        if not self.durations and len(own.seen) == 2:
            last_steps, last_time = own.seen[-1]
            left = self._seconds_per_step(own) * (self.max_steps - last_steps)
            return max(0.0, left - (self.clock() - last_time))
        fraction = 1 - own.first_steps / self.max_steps
        whole = startup + seconds_per_cost * cell.relative_cost
        return max(0.0, fraction * whole - (self.clock() - own.started_at))

    def _fit_durations(self) -> tuple[float, float]:
        """Return the start-up time of a cell, and its further time per relative cost."""
        costs, seconds = zip(*self.durations, strict=True)
        if len(set(costs)) == 1:
            return 0.0, fmean(seconds) / costs[0]
        line = linear_regression(costs, seconds)
        return max(line.intercept, 0.0), max(line.slope, 0.0)

    def _fit_running(self) -> tuple[float, float] | None:
        """Return the same from the cells that are being trained; `None` if they have just started."""
        known = [(cell, own) for cell, own in self.running.items() if len(own.seen) == 2]
        if not known:
            return None
        costs = (
            self._seconds_per_step(own) * self.max_steps / cell.relative_cost for cell, own in known
        )
        return fmean(own.seen[0][1] - own.started_at for _, own in known), fmean(costs)

    def _seconds_per_step(self, own: RunningCell) -> float:
        (first_steps, first_time), (last_steps, last_time) = own.seen
        return (last_time - first_time) / (last_steps - first_steps)

    def _draw(self) -> None:
        for cell, own in self.running.items():
            description = f"{self._place(own)} {cell.name} {own.meta_steps:,}/{self.max_steps:,}"
            if own.bar is not None:
                self.bars.update(own.bar, completed=own.meta_steps, description=description)
        if self.parallel > 1:
            description = f"{self.ended} of {len(self.cells)} cells done"
        elif not self.running:
            return
        done = self.ended + sum(own.meta_steps for own in self.running.values()) / self.max_steps
        self.bars.update(
            self.bar,
            completed=done,
            description=description,
            left=f"{self.time_left()} left",
            visible=True,
        )

    def _place(self, own: RunningCell) -> str:
        return f"[{own.number}/{len(self.cells)}]"

    def _print(self, cell: Cell, event: str) -> None:
        self._print_line(f"{self._place(self.running[cell])} {cell.name}: {event}")

    def _print_progress(self) -> None:
        """Print how far each cell is that is being trained."""
        left = f"; {self.time_left()} left for all cells"
        if self.parallel == 1:
            ((cell, own),) = self.running.items()
            self._print(cell, f"{own.meta_steps:,} of {self.max_steps:,} meta-steps{left}")
            return
        cells = (f"{cell.name} {own.meta_steps:,}" for cell, own in self.running.items())
        self._print_line(f"{', '.join(cells)} of {self.max_steps:,} meta-steps{left}")

    def _print_line(self, line: str) -> None:
        self.last_line = self.clock()
        self.console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
