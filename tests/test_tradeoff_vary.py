"""`maml tradeoff --vary` trains every value of further keys, each in its own folder."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maml_pipeline.cli.tradeoff import warn_if_never_validated
from maml_pipeline.cli.tradeoff_arguments import varied_key
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.comparison import compare
from maml_pipeline.report.tradeoff_plot import draw_overview
from maml_pipeline.tradeoff.grid import make_grid
from maml_pipeline.varied import folder_suffix, setting_text, short_names
from tests.helpers import CONFIGS, ROOT, Maml, make_run, process_environment, read_config

TOY = ("tradeoff", "--config", CONFIGS / "toy.yaml")
SHORT = (
    *("--trainer.max_steps", 4, "--trainer.val_check_interval", 2),
    *("--data.val_tasks", 5, "--data.test_tasks", 5),
)
RATES = "model.inner_lr=0.05,0.2"


@pytest.fixture(autouse=True)
def _cells_can_import_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in process_environment().items():
        if key in ("PYTHONPATH", "OMP_NUM_THREADS"):
            monkeypatch.setenv(key, value)


def listed(printed: str) -> list[str]:
    """Return the names of the cells that a dry run lists."""
    return [Path(line.split(":")[0]).name for line in printed.strip().splitlines()]


# Cells ------------------------------------------------------------------------------------------


def test_every_combination_is_a_cell(maml: Maml, tmp_path: Path) -> None:
    vary = ("--vary", RATES, "--vary", "data.meta_batch_size=4,8")
    names = listed(maml(*TOY, "--orders", "first,second", "--seeds", "0,1", *vary, "--dry_run"))
    assert names == [
        f"{order}-k1-meta_batch_size={size}-inner_lr={rate}-s{seed}"
        for seed in (0, 1)
        for order in ("first", "second")
        for rate in (0.05, 0.2)
        for size in (4, 8)
    ]
    assert not [*tmp_path.iterdir()]


def test_without_vary_cells_keep_their_names(maml: Maml) -> None:
    assert listed(maml(*TOY, "--dry_run")) == ["first-k1-s0", "second-k1-s0", "checkpointed-k1-s0"]


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ("model.inner_lr=.1,1e-5,2", ["inner_lr=0.1", "inner_lr=1e-05", "inner_lr=2"]),
        ("model.optimizer.lr=0.01,0.02", ["lr=0.01", "lr=0.02"]),
        ("model.first_order_meta_steps=0,3", ["first_order_meta_steps=0", "first_order_meta_steps=3"]),
        ("trainer.gradient_clip_val=null,10", ["gradient_clip_val=null", "gradient_clip_val=10"]),
        ("model.optimizer.betas=[0.5,0.9],[0.9,0.99]", ["betas=0.5,0.9", "betas=0.9,0.99"]),
        ("model.optimizer.amsgrad=true,false", ["amsgrad=true", "amsgrad=false"]),
        ("model.engine=vectorized,learn2learn", ["engine=vectorized", "engine=learn2learn"]),
        ("model.optimizer=torch.optim.SGD", ["optimizer=SGD-07f9e3cc"]),
    ],
)
def test_a_value_names_the_folder_of_its_cell(vary: str, names: list[str], maml: Maml) -> None:
    printed = maml(*TOY, "--orders", "first", "--vary", vary, "--dry_run")
    assert listed(printed) == [f"first-k1-{name}-s0" for name in names]


VALUES: tuple[Any, ...] = (
    *(0.1, 1, 10, 1e-5, -0.5, True, False, None, [], [1], [1, 2], [12], ["a"], [[1], [2]]),
    *("a", "A", "a,b", "a/b", "a b", "..", "", "é", "x" * 300, "1,2", "\n", "con=x", {"a": 1}),
    *({"class_path": "a.B", "init_args": {"c": value}} for value in (1, 2)),
    {"class_path": "../x"},
)


def test_different_values_have_different_safe_names() -> None:
    names = [folder_suffix({"model.a": value}) for value in VALUES]
    # Some file systems ignore case.
    assert len({name.lower() for name in names}) == len(VALUES)
    for name in names:
        assert re.fullmatch(r"-a=[A-Za-z0-9_.,+-]+", name) and len(name) < 60


def test_keys_have_the_shortest_names_that_tell_them_apart() -> None:
    assert short_names(["model.inner_lr"]) == {"model.inner_lr": "inner_lr"}
    keys = {"model.optimizer.init_args.lr": 1, "model.lr": 2, "lr": 3}
    assert [*short_names(keys).values()] == ["optimizer.lr", "model.lr", "lr"]
    rates = short_names(["model.learned_inner_lr.lr", "model.optimizer.init_args.lr"])
    assert [*rates.values()] == ["learned_inner_lr.lr", "lr"]


@pytest.mark.parametrize(
    ("vary", "names", "texts"),
    [
        (
            "model.adapt=null,[weight],[weight,bias]",
            ["adapt=null", "adapt=weight-e6ef59bc", "adapt=weight_bias-08695943"],
            ["adapt null", "adapt weight", "adapt weight bias"],
        ),
        (
            "model.learned_inner_lr=null,{lr: 0.001}",
            ["learned_inner_lr=null", "learned_inner_lr=lr_0.001-bb90828f"],
            ["learned_inner_lr null", "learned_inner_lr lr 0.001"],
        ),
        (
            "model.learned_inner_lr.lr=0.001,0.01",
            ["learned_inner_lr.lr=0.001", "learned_inner_lr.lr=0.01"],
            ["learned_inner_lr.lr 0.001", "learned_inner_lr.lr 0.01"],
        ),
    ],
)
def test_what_adapts_and_learned_rates_can_be_varied(
    vary: str, names: list[str], texts: list[str], maml: Maml
) -> None:
    found = listed(maml(*TOY, "--orders", "first", "--vary", vary, "--dry_run"))
    assert found == [f"first-k1-{name}-s0" for name in names]
    key, values = varied_key(vary)
    settings = [{key: yaml.safe_load(value)} for value in values]
    assert [setting_text(setting) for setting in settings] == texts
    history = [{"step": 9, "val/loss": 0.5}]
    order = GradientOrder(first_order=True)
    (rows,) = compare([make_run(order, 1, varied=one, history=history) for one in settings]).values()
    (ax, _) = draw_overview({"toy": rows}).axes
    (chosen,) = [setting_text(row.setting) for row in rows if row.chosen]
    assert {text.get_text() for text in ax.texts} == {f"first ({chosen.partition(' ')[2]})"}
    assert setting_text({"model.inner_lr": 0.1, "data.n": 4}) == "inner_lr 0.1, n 4"


def test_cells_of_a_grid_have_different_names() -> None:
    settings: list[dict[str, Any]] = [{"model.inner_lr": rate} for rate in (0.1, 0.2)]
    grid = make_grid(["first", "second"], [1, 5], [0, 1], settings)
    assert len({cell.name for cell in grid}) == len(set(grid)) == len(grid) == 16
    assert [cell.seed for cell in grid] == [0] * 8 + [1] * 8


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["model.inner_lr=0.1,-1"], "model.inner_lr is -1.0; it must be a finite number above 0"),
        (["model.inner_lr=0.1,x"], "model.inner_lr is x; it must be a number"),
        (["model.inner_rate=1"], "did you mean --model.inner_lr 1"),
        (["model.inner_lr=0.1,0.10"], "model.inner_lr 0.1 more than once"),
        (["seed_everything=0,1"], "use --seeds"),
        (["run.dir=a"], "use --out"),
        (["trainer.logger=CSVLogger"], "give all runs the same, with --trainer.logger VALUE"),
        (["data.tasks.shots=1,5"], "which changes what is validated"),
        (["data.meta_batch_size=4", "model.inner_lr=nan"], "model.inner_lr is nan"),
    ],
)
def test_a_bad_value_is_named_and_leaves_nothing(
    vary: list[str], message: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    flags = [flag for one in vary for flag in ("--vary", one)]
    assert message in maml_error(*TOY, *flags)
    assert not [*tmp_path.iterdir()]


# Training ---------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_tradeoff_is_extended_by_values_and_chooses_by_validation(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    grid = (*TOY, *SHORT, "--orders", "first", "--out", tmp_path / "grid")
    assert "2 cells, 0 finished" in maml(*grid, "--vary", RATES)
    printed = maml(*grid, "--vary", f"{RATES},0.4")
    assert "3 cells, 2 finished" in printed

    folders = {rate: tmp_path / "grid" / f"first-k1-inner_lr={rate}-s0" for rate in (0.05, 0.2, 0.4)}
    for rate, folder in folders.items():
        config = read_config(folder)
        assert config["model"]["inner_lr"] == rate and config["run"]["varied"] == ["model.inner_lr"]

    summary = json.loads((tmp_path / "grid" / "tradeoff.json").read_text())
    assert summary["varied"] == {"model.inner_lr": [0.05, 0.2, 0.4]}
    assert len(summary["cells"]) == 3 and summary["failed"] == []
    rows = {row["varied"]["model.inner_lr"]: row for row in summary["comparison"]}
    best = min(rows, key=lambda rate: rows[rate]["validation"])
    assert [rate for rate, row in rows.items() if row["chosen"]] == [best]
    for rate, row in rows.items():
        lines = (folders[rate] / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("val/loss")
        logged = [float(value) for line in lines[1:] if (value := line.split(",")[column])]
        assert row["validation"] == min(logged)
    page = (tmp_path / "grid" / "report" / "report.html").read_text()
    assert page.count('class="outdone"') == 2 and "Varied: inner_lr in 0.05, 0.2, 0.4" in page

    # A folder keeps its varied keys; their value in the config does not matter.
    assert "in which --vary has model.inner_lr, not nothing" in maml_error(*grid)
    vary = ("--vary", RATES, "--vary", "data.meta_batch_size=4")
    assert "not data.meta_batch_size and model.inner_lr" in maml_error(*grid, *vary)
    other = tmp_path / "other.yaml"
    other.write_text("model: {inner_lr: 0.3}\n")
    assert "3 cells, 3 finished" in maml(*grid, "--config", other, "--vary", f"{RATES},0.4")

    # Each cell is what `maml fit` trains with its value.
    fit = ("--run.dir", tmp_path / "alone", "--model.first_order", "true", "--model.inner_lr", 0.4)
    maml("fit", *TOY[1:], *SHORT, *fit, "--trainer.enable_progress_bar", "false")
    cell, alone = ((folder / "test.json").read_text() for folder in (folders[0.4], tmp_path / "alone"))
    assert json.loads(cell)["test/loss"] == json.loads(alone)["test/loss"]


@pytest.mark.integration
def test_a_class_is_trained_with_its_own_defaults(maml: Maml, tmp_path: Path) -> None:
    # AdamW decays weights by default, Adam of the config does not.
    vary = ("--vary", "model.optimizer=torch.optim.AdamW")
    maml(*TOY, *SHORT, "--orders", "first", "--out", tmp_path / "grid", *vary)
    (cell,) = (path for path in (tmp_path / "grid").iterdir() if path.name.startswith("first"))
    optimizer = read_config(cell)["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["weight_decay"] == 0.01 and optimizer["init_args"]["lr"] == 0.02


@pytest.mark.integration
def test_an_older_folder_still_resumes(maml: Maml, tmp_path: Path) -> None:
    grid = (*TOY, *SHORT, "--orders", "first", "--out", tmp_path / "grid")
    maml(*grid)
    config = tmp_path / "grid" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("  varied: null\n", ""))
    assert config.read_text() != text
    assert "1 cell, 1 finished" in maml(*grid)


@pytest.mark.integration
def test_slurm_gets_an_element_for_each_value(maml: Maml) -> None:
    vary = ("--vary", "model.optimizer.betas=[0.5,0.9],[0.9,0.99]", "--vary", RATES)
    printed = maml("submit", "--dry_run", "--tradeoff", *TOY[1:], "--orders", "first,second", *vary)
    array, report = (shlex.split(line) for line in printed.splitlines() if line.startswith("sbatch "))
    assert "--array=0,1,2,3,4,5,6,7" in array
    for command in (array, report):
        at = command.index("--vary")
        assert tuple(command[at : at + 4]) == vary
    assert str(ROOT / "slurm" / "tradeoff.sbatch") in array


def test_a_tradeoff_that_never_validates_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    warn_if_never_validated({"max_steps": 40, "val_check_interval": 40})
    assert not caplog.records
    warn_if_never_validated({"max_steps": 40, "val_check_interval": 1000})
    assert "max_steps is 40 and trainer.val_check_interval 1000" in caplog.text
