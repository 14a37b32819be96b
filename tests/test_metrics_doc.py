"""docs/metrics.md names every metric that a run logs, and no other."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

from tests.helpers import CONFIGS

DOCUMENT = (CONFIGS.parent / "docs" / "metrics.md").read_text()
DOCUMENTED = re.findall(r"^\| `([^`]+)` \|", DOCUMENT, flags=re.MULTILINE)
ELSEWHERE = {"memory/meta_step_peak_active_bytes"}
"""Not logged on the CPU."""


def pattern(name: str) -> str:
    """Write a documented name as a regular expression."""
    for part, meant in (("<measure>", "(loss|accuracy)"), ("<t>", r"\d+"), ("<layer>", r"[\w.]+")):
        name = name.replace(part, meant)
    return name


def logged(folder: Path) -> set[str]:
    with (folder / "metrics.csv").open() as file:
        return set(csv.DictReader(file).fieldnames or []) - {"step"}


def test_every_logged_metric_is_documented_and_vice_versa(
    maml: Callable[..., str], synthetic_omniglot: Path, synthetic_cache: Path, tmp_path: Path
) -> None:
    few = {
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 6,
        "trainer.log_every_n_steps": 2,
        "probes.every": 12,
        "data.meta_batch_size": 1,
        "data.val_tasks": 2,
        "data.test_tasks": 2,
        "data.tasks.root": synthetic_omniglot,
        "data.tasks.cache_dir": synthetic_cache,
        "model.compile": "false",
        "model.network.filters": 4,
        "model.first_order_steps": 3,
        "run.dir": tmp_path / "run",
    }
    configs = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml", "--config", CONFIGS / "cpu.yaml")
    maml("fit", *configs, *(part for key, value in few.items() for part in (f"--{key}", value)))

    names = logged(tmp_path / "run")
    undocumented = {n for n in names if not any(re.fullmatch(pattern(d), n) for d in DOCUMENTED)}
    assert not undocumented
    never = {d for d in DOCUMENTED if not any(re.fullmatch(pattern(d), n) for n in names)}
    assert never == ELSEWHERE
