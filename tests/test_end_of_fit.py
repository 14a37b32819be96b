"""The end of `maml fit`: how long it took, where the run is, and what to type next."""

import re
import shlex
from pathlib import Path

import pytest

from maml_pipeline.text import duration
from tests.helpers import SHORT, SHORT_NAME, Maml, read_checkpoint

TOOK = r"Training took (\d\.\d) s(?: in (\d) starts)?, .* s.*; results are in (.*)"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s")),
        *((3599.6, "1 h 0 min"), (7500, "2 h 5 min"), (2 * 86400 + 4 * 3600 + 59, "2 d 4 h")),
    ],
)
def test_durations_have_their_one_or_two_largest_units(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def training_seconds(folder: Path, which: str = "last") -> float:
    return float(read_checkpoint(folder, which)["callbacks"]["TrainingTime"]["seconds"])


@pytest.mark.integration
def test_the_time_of_training_is_counted_over_all_starts(maml: Maml) -> None:
    took = re.search(TOOK, maml("fit", *SHORT))
    assert took is not None and took[2] is None and took[3] == f"runs/{SHORT_NAME}"
    first = training_seconds(Path("runs", SHORT_NAME))
    took = re.search(TOOK, maml("fit", *SHORT, "--ckpt_path", "last", "--trainer.max_steps", 20))
    assert took is not None and took[2] == "2"
    # Not that of the tested checkpoint, which Lightning loads too.
    both = training_seconds(Path("runs", SHORT_NAME))
    assert both > first
    assert float(took[1]) == pytest.approx(both, abs=0.3)


@pytest.mark.integration
def test_a_start_that_trains_nothing_says_so(maml: Maml) -> None:
    stops_at_once = (
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"),
        *("--trainer.callbacks.stopping_threshold", 1e9),
    )
    for settings, folder in (((), "whole"), (stops_at_once, "ended early")):
        run = ("fit", *SHORT, *settings, "--run.dir", folder)
        assert re.search(TOOK, maml(*run))
        printed = maml(*run, "--ckpt_path", "last")
        nothing = rf"Nothing was left to train; this start took .* s; results are in {folder}"
        assert re.search(nothing, printed)
    assert "Nothing was left to train" in maml("fit", *SHORT, "--trainer.max_steps", 0)


@pytest.mark.integration
def test_what_to_type_next_runs_as_typed(maml: Maml) -> None:
    folder = """my runs/it's a "test" of ü"""
    *_, took, report, export, python = maml("fit", *SHORT, "--run.dir", folder).splitlines()
    assert took.endswith(f"results are in {folder}")
    program, *arguments = shlex.split(report.removeprefix("Next: "))
    assert program == "maml" and folder in maml(*arguments)
    program, *arguments = shlex.split(export)
    assert program == "maml"
    maml(*arguments)
    assert Path(arguments[-1]).stat().st_size
    namespace: dict[str, object] = {}
    exec("from maml_pipeline import MetaLearner", namespace)
    assert type(eval(python.strip(), namespace)).__name__ == "MetaLearner"


@pytest.mark.integration
def test_a_job_does_not_tell_what_to_type_next(maml: Maml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAML_OFFLINE", "")  # which a run in a job sets
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert re.search(TOOK, maml("fit", *SHORT).splitlines()[-1])
