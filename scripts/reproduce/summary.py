"""Print the README's first table: what second order gains on each benchmark, and what it costs.

    python -m scripts.reproduce.summary

Reads results/*.json, which the other scripts of this folder write.
"""

from pathlib import Path
from typing import NamedTuple

from scripts.reproduce.results import read_results
from scripts.reproduce.tables import mean_text, result_text

RESULTS = Path("results")


class Benchmark(NamedTuple):
    """A line of the table.

    Args:
        name: In the first column.
        file: Its results.
        first: Training of the row in first order.
        second: Training of the row in second order.
        steps: Number of inner steps after which results are compared.
    """

    name: str
    file: str
    first: str
    second: str
    steps: int


BENCHMARKS = (
    Benchmark("sine waves, 5 shots", "sine.json", "sine-5shot", "sine-5shot", 1),
    Benchmark("sine waves, 10 shots", "inner_steps.json", "sine-k5", "sine-k5", 5),
    Benchmark("Omniglot 5-way 1-shot", "omniglot.json", "omniglot-5w1s", "omniglot-5w1s", 3),
    Benchmark(
        "Omniglot 20-way 1-shot",
        *("omniglot.json", "omniglot-20w1s-first-8000", "omniglot-20w1s-second-8000", 5),
    ),
)


def summary(folder: Path = RESULTS) -> str:
    """Return the Markdown table.

    Args:
        folder: Where the results are.
    """
    head = ("", "inner steps", "training", "first order", "second order", "in print", "memory", "time")
    lines = [" | ".join(head), "|".join(["---", "---:", *["---"] * 4, "---:", "---:"])]
    lines += [_line(benchmark, folder) for benchmark in BENCHMARKS]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def _line(benchmark: Benchmark, folder: Path) -> str:
    rows = {(row["training"], row["order"]): row for row in read_results(folder / benchmark.file)}
    first, second = rows[benchmark.first, "first"], rows[benchmark.second, "second"]
    seeds = len(second["seeds"])
    cells = (
        benchmark.name,
        str(benchmark.steps),
        f"{second['meta_steps']:,} meta-steps, {seeds} seed{'s' if seeds > 1 else ''}",
        *(result_text(row["measure"], row["result"][str(benchmark.steps)]) for row in (first, second)),
        " / ".join(
            mean_text(row["measure"], row["published"].get(str(benchmark.steps)))
            for row in (first, second)
        ),
        *(f"{second[cost] / first[cost]:.1f} ×" for cost in ("peak_bytes", "meta_step_ms")),  # noqa: RUF001
    )
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    print(summary())


if __name__ == "__main__":
    main()
