"""Each gradient order has one name, from the config to the reports."""

import json
from pathlib import Path

import pytest
import yaml

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import DEFAULT_ORDERS, GradientOrder, Method
from maml_pipeline.tradeoff.grid import make_grid
from tests.helpers import TOY, Maml

ORDERS = [
    GradientOrder(first_order=True),
    *(GradientOrder(False, n, method) for method in Method for n in (0, 1, 12, None)),
]


def test_every_order_has_a_name_of_its_own_that_is_parsed() -> None:
    names = [str(order) for order in ORDERS]
    assert [GradientOrder.parse(name) for name in names] == ORDERS
    for values in (names, [order.label for order in ORDERS], [order.phrase for order in ORDERS]):
        assert len(set(values)) == len(ORDERS)
    assert [str(order) for order in DEFAULT_ORDERS] == ["first", "second", "checkpointed"]
    assert sorted(ORDERS, key=lambda order: order.rank) == ORDERS


@pytest.mark.parametrize(
    "name", ["third", "unrolled", "truncated", "truncated-", "truncated-01", "truncated--1", "First"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GradientOrder.parse(name)


def test_a_truncated_cell_needs_as_many_inner_steps() -> None:
    names = [cell.name for cell in make_grid(["truncated-2", "first"], [2, 3], [0])]
    assert names == ["truncated-2-k2-s0", "first-k2-s0", "truncated-2-k3-s0", "first-k3-s0"]
    with pytest.raises(UserError, match=r"orders has truncated-2, .* but inner_steps has 1; leave one"):
        make_grid(["truncated-2"], [1, 3], [0])


@pytest.mark.integration
def test_a_tradeoff_of_the_whole_scale_is_reported_by_its_names(maml: Maml, tmp_path: Path) -> None:
    orders = ["first", "truncated-2", "second", "hessian-free"]
    short = ("--trainer.max_steps", 12, "--data.test_tasks", 20, "--data.val_tasks", 20)
    maml("tradeoff", *TOY, *short, "--orders", ",".join(orders), "--inner_steps", 3, "--out", "grid")
    runs = [json.loads((tmp_path / "grid" / f"{o}-k3-s0" / "test.json").read_text()) for o in orders]
    losses = dict(zip(orders, [run["test/loss"] for run in runs], strict=True))
    assert len({losses[order] for order in orders[:3]}) == 3  # each trains other weights
    assert losses["hessian-free"] == pytest.approx(losses["second"], rel=1e-3)
    config = tmp_path / "grid" / "truncated-2-k3-s0" / "config.yaml"
    model = yaml.safe_load(config.read_text())["model"]
    assert (model["first_order"], model["differentiated_steps"]) == (False, 2)
    rows = json.loads(maml("runs", "grid", "--json", "--sort", "order"))
    assert [row["order"] for row in rows] == orders
    page = (tmp_path / "grid" / "report" / "report.html").read_text()
    assert all(f"swatch {order}" in page for order in orders)
    assert all(GradientOrder.parse(order).label in page for order in orders)
