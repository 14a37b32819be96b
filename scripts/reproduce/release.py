"""Write the trained networks of the other scripts into a folder, each with a card, for publication.

    python -m scripts.reproduce.release release      # after .sine, .omniglot, ...

For each row of a table, the seed that validated best: its parameters (`NAME.safetensors`), its class and
origin (`NAME.yaml`), and a card with its result and how to load it (`NAME.md`).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maml_pipeline.files import write_atomically
from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.runs.export import export_network
from maml_pipeline.runs.run import Run
from scripts.reproduce import inner_steps, omniglot, sine
from scripts.reproduce.results import results_of, rows_of
from scripts.reproduce.tables import result_text
from scripts.reproduce.training import Training

TRAININGS = [*sine.TRAININGS, *omniglot.TRAININGS, *inner_steps.TRAININGS]

CARD = """\
# {title}

{task}, {method}: initial parameters that `maml_pipeline` meta-learned, from the best checkpoint on the
validation tasks.

| | |
|---|---|
| result on {tasks:,} test tasks | {measure} {result} after inner step {steps} |
| seed | {seed}, of {seeds} |
| meta-steps of {batch} tasks | {meta_step:,} of {meta_steps:,} |
| inner learning rate | {inner_lr:g} |
| trained | {date}, {device}, torch {torch} |
| command | `maml {command}` |

```python
from safetensors.torch import load_file
from {module} import {network}

network = {network}({arguments})
network.load_state_dict(load_file("{name}.safetensors"))
```

The result is the mean over the test tasks with its 95 % confidence interval{protocol}.
`{name}.yaml` has the class, its arguments and how it adapts to a task.
"""


def release(trainings: list[Training], runs: Path, out: Path) -> list[Path]:
    """Export the best seed of each row of finished trainings, and write its card.

    Args:
        trainings: What may be trained.
        runs: Where the runs are.
        out: The folder for the release.

    Returns:
        The cards.
    """
    cards = []
    for training in trainings:
        if training.is_finished(runs):
            for row, result in _rows(training, runs):
                run = _best(row)
                name = release_name(training, str(row.order))
                meta_step = export_network(run.source, "best", out / f"{name}.safetensors").meta_step
                text = _card(name, run, result, meta_step, training.command(Path("runs")))
                write_atomically(out / f"{name}.md", text)
                cards.append(out / f"{name}.md")
    return cards


def release_name(training: Training, order: str) -> str:
    """Return the name of the files of a row, without their suffix."""
    return f"{training.name}-{order}" if len(training.methods) > 1 else training.name


def _rows(training: Training, runs: Path) -> Iterator[tuple[ComparisonRow, dict[str, Any]]]:
    rows = (row for row in rows_of(runs / training.name) if not row.is_outdone)
    yield from zip(rows, results_of(training, runs), strict=True)


def _best(row: ComparisonRow) -> Run:
    """Return the run that validated best."""

    def score(run: Run) -> float:
        value = run.best_validation
        assert value is not None
        return value if run.higher_is_better else -value

    return max(row.evaluated, key=score)


def _card(name: str, run: Run, result: dict[str, Any], meta_step: int, command: list[str]) -> str:
    network = run.config["model"]["network"]
    module, _, class_name = network["class_path"].rpartition(".")
    of_images = f", transductive: {str(result['transductive']).lower()}"
    measured, own = run.measure_at_test[1], run.result
    steps = len(run.test_curve) - 1 if measured is None else measured
    assert own is not None
    return CARD.format(
        **{key: result[key] for key in ("task", "method", "measure", "inner_lr", "meta_steps")},
        **{key: result[key] for key in ("date", "device", "torch")},
        title=name,
        name=name,
        result=result_text(result["measure"], {"mean": own.mean, "ci95": own.ci95}),
        steps=steps,
        tasks=result["test_tasks"],
        batch=result["meta_batch_size"],
        seed=run.seed,
        seeds=len(result["seeds"]),
        meta_step=meta_step,
        command=" ".join(command),
        module=module,
        network=class_name,
        arguments=", ".join(f"{key}={value!r}" for key, value in network["init_args"].items()),
        protocol=of_images if result["measure"] == "accuracy" else "",
    )


def main() -> None:
    """Write the release."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the release")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="folder of the runs")
    settings = parser.parse_args()
    for card in release(TRAININGS, settings.runs, settings.out):
        print(card)


if __name__ == "__main__":
    main()
