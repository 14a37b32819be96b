"""Tables of docs/results.md are those of results/map.json, and the script that writes both resumes."""

import json
from pathlib import Path

import pytest
from torch import nn

from maml_pipeline.cli import main
from maml_pipeline.meta_gradient.native.network import feed_forward
from maml_pipeline.networks import MLP, ConvNet
from scripts.reproduce.map import EXPERIMENTS, ORDERS, result, table
from scripts.reproduce.tables import search_table
from scripts.reproduce.training import Training, write_origin
from tests.helpers import ROOT
from tests.written_runs import write_search

RATES = {0.01: 0.3, 0.1: 0.2}
NAMES = {"sine": "sine-10shot", "omniglot": "omniglot-20w1s"}
SEEDS = {"sine": [0, 1], "omniglot": [0]}


def test_the_tables_of_the_results_are_those_of_the_committed_runs() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    results = json.loads((ROOT / "results" / "map.json").read_text())
    assert table(results) in text
    for each in results.values():
        assert search_table(each["title"], each["rows"][0]["measure"], each["search"]) in text


@pytest.mark.parametrize(("name", "network"), [("sine", MLP()), ("omniglot", ConvNet(ways=20))])
def test_the_measured_memory_follows_the_law_of_truncation(name: str, network: nn.Module) -> None:
    experiment = json.loads((ROOT / "results" / "map.json").read_text())[name]
    peak = {row["order"]: row["peak_bytes"] for row in experiment["rows"]}
    each_step = peak["truncated-2"] - peak["truncated-1"]
    # A truncated order also keeps the parameters of its first differentiated step, on each thread.
    known = feed_forward(network, dict(network.named_parameters()))
    assert known is not None
    parameters = 4 * sum(known.sizes) * experiment["origin"]["threads"]
    assert peak["second"] == peak["truncated-1"] + 4 * each_step - parameters


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_every_order_is_searched_and_then_trained_at_its_best(
    experiment: Training,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    synthetic_omniglot: Path,
) -> None:
    (varied,) = (flag for flag in experiment.search if flag.startswith("--vary="))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAML_OMNIGLOT_ROOT", str(synthetic_omniglot))
        main([*experiment.search_command(tmp_path), "--dry_run"])
        listed = capsys.readouterr().out.splitlines()
        assert len(listed) == len(ORDERS) * len(varied.split(","))
        write_search(
            experiment.search_folder(tmp_path), dict.fromkeys(ORDERS, RATES), 5, NAMES[experiment.name]
        )
        main([*experiment.command(tmp_path), "--dry_run"])
    listed = [line for line in capsys.readouterr().out.splitlines() if "to be trained" in line]
    seeds = SEEDS[experiment.name]
    cells = [f"{order}-k5-inner_lr=0.1-s{seed}" for seed in seeds for order in ORDERS]
    assert [Path(line.partition(":")[0]).name for line in listed] == cells


def test_the_table_tells_the_rate_the_gain_and_the_costs_of_every_order(tmp_path: Path) -> None:
    losses = {"first": 0.5, "truncated-1": 0.3, "second": 0.1}
    # `write_search` writes test results of the opposite sign.
    write_search(tmp_path / "sine", {order: {0.1: -loss} for order, loss in losses.items()}, 5)
    write_search(tmp_path / "sine-search", dict.fromkeys(losses, RATES), 5)
    write_origin(tmp_path / "sine", threads=1)
    summary = tmp_path / "sine-search" / "tradeoff.json"
    varied = {"varied": {"model.inner_lr": [*RATES]}}
    summary.write_text(json.dumps({**json.loads(summary.read_text()), **varied}))
    found = result(EXPERIMENTS[0], tmp_path)
    assert found["search"]["values"] == [*RATES]
    assert found["search"]["validation"]["truncated-1"] == {"0.01": 0.3, "0.1": 0.2}
    lines = table({"sine": json.loads(json.dumps(found))}).splitlines()
    assert lines[2:] == [
        "| sine, 10 shots | first | 0.1 | 0.5000 ± 0.0100 | 0 % | 1 | 1 |",
        "| sine, 10 shots | truncated 1 | 0.1 | 0.3000 ± 0.0100 | 50 % | 1.00 × | 1.00 × |",  # noqa: RUF001
        "| sine, 10 shots | second | 0.1 | 0.1000 ± 0.0100 | 100 % | 1.00 × | 1.00 × |",  # noqa: RUF001
    ]
