"""docs/metrics.md names every metric that a run logs, and no other."""

from collections.abc import Callable
from pathlib import Path

from tests.documented_metrics import DOCUMENTED, matches, undocumented
from tests.helpers import CONFIGS, read_metrics

ELSEWHERE = {
    *("memory/meta_step_peak_active_bytes", "speed/parallel_cells"),
    *(f"hessian_free_gap/{measure}" for measure in ("cosine", "norm_ratio", "relative_error")),
}
"""Not logged on the CPU, by a run alone, or with another method (`tests/test_order_gap_probe.py`)."""


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
        "model.network.filters": 4,
        "model.first_order_meta_steps": 3,
        "model.learned_inner_lr.lr": 0.01,
        "run.dir": tmp_path / "run",
    }
    configs = ("--config", CONFIGS / "omniglot" / "5way_1shot.yaml", "--config", CONFIGS / "cpu.yaml")
    maml("fit", *configs, *(part for key, value in few.items() for part in (f"--{key}", value)))

    names = set(read_metrics(tmp_path / "run")[0]) - {"step"}
    assert not undocumented(names)
    never = {d for d in DOCUMENTED if not any(matches(name, d) for name in names)}
    assert never == ELSEWHERE
