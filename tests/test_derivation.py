"""`maml derive`: three independent methods agree, and a wrong gradient is reported."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maml_pipeline.derivation.derive import derive
from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.closed_form import linear_meta_gradient
from maml_pipeline.tasks import Task
from tests.helpers import Maml

FIRST_LISTING, SECOND_LISTING = "-1.9347891807556152", "-0.7597505450248718"


def figures(maml: Maml, *arguments: object) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(maml("derive", "--json", *arguments))
    return result


def test_the_first_listing_is_reproduced(maml: Maml) -> None:
    first = figures(maml, "--w0", FIRST_LISTING)["first_order"]
    assert first["support_grad"] == {"w": -3.8695783615112305, "b": -3.8695783615112305}
    assert first["fast_weights"] == {"w": 1.9347891807556152, "b": 3.8695783615112305}
    assert first["meta_grad"]["autograd"]["w"] == 30.956626892089844
    assert first["updated"]["w"] == pytest.approx(-32.891414642333984, rel=2**-22)


def test_the_second_listing_is_reproduced(maml: Maml) -> None:
    second = figures(maml, "--w0", SECOND_LISTING)["second_order"]
    assert second["support_grad"] == {"w": -1.5195010900497437, "b": -1.5195010900497437}
    assert second["fast_weights"] == {"w": 0.7597505450248718, "b": 1.5195010900497437}
    assert second["meta_grad"]["autograd"]["w"] == pytest.approx(-24.312015533447266, rel=2**-22)
    assert second["updated"]["w"] == pytest.approx(23.552265167236328, rel=2**-22)


def test_the_text_shows_what_create_graph_changes(maml: Maml) -> None:
    text = maml("derive", "--w0", SECOND_LISTING)
    assert "-1.5195010900497437" in text
    assert re.search(r"requires_grad\W+False", text)
    assert re.search(r"requires_grad\W+True", text)
    assert "2.86 times as long" in text


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    inputs=st.integers(1, 3),
    points=st.integers(1, 4),
    steps=st.integers(0, 8),
    lr=st.floats(1e-3, 0.3),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    double=st.booleans(),
    first_order=st.booleans(),
)
def test_the_three_methods_agree_on_random_tasks(
    seed: int,
    inputs: int,
    points: int,
    steps: int,
    lr: float,
    scale: float,
    double: bool,
    first_order: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    task = Task(draw(points, inputs), draw(points, 1) * scale, draw(2, inputs), draw(2, 1) * scale)
    result = derive(draw(inputs + 1) * scale, task, InnerLoop(lr, steps, first_order), outer_lr=1.0)
    assert result.disagreements() == []


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tolerance_is_near_the_dtype_precision(dtype: torch.dtype, first_order: bool) -> None:
    task = Task(*(torch.tensor([[value]], dtype=dtype) for value in (1.0, 0.0, 2.0, 0.0)))
    theta = torch.tensor([-0.75, 0.0], dtype=dtype)
    result = derive(theta, task, InnerLoop(1.0, 1, first_order), outer_lr=1.0)
    for tolerance in (result.closed_form_tolerance, result.finite_difference_tolerance):
        assert (tolerance < 1000 * torch.finfo(dtype).eps * result.autograd.norm()).all()

    wrong = replace(result, autograd=result.autograd * (1 + 1000 * torch.finfo(dtype).eps))
    assert len(wrong.disagreements()) >= 2
    assert replace(result, autograd=result.autograd * float("nan")).disagreements()


def test_a_wrong_gradient_is_reported_and_fails(
    maml_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "maml_pipeline.derivation.derive.linear_meta_gradient",
        lambda *arguments: linear_meta_gradient(*arguments) * 1.001,
    )
    assert "autograd and the closed form differ" in maml_error("derive", "--w0", "1")


def test_without_inner_steps_the_orders_are_the_same(maml: Maml) -> None:
    both = figures(maml, "--w0", "1.5", "--inner_steps", 0)
    assert both["first_order"]["meta_grad"] == both["second_order"]["meta_grad"]
    assert both["first_order"]["fast_weights"]["w"] == 1.5


def test_a_repeated_support_point_counts_as_one(maml: Maml) -> None:
    once = figures(maml, "--w0", "0.5")
    thrice = figures(maml, "--w0", "0.5", "--support_x", "[1,1,1]", "--support_y", "[0,0,0]")
    for order in ("first_order", "second_order"):
        for method in ("autograd", "closed_form", "finite_difference"):
            for name in ("w", "b"):
                expected = once[order]["meta_grad"][method][name]
                assert thrice[order]["meta_grad"][method][name] == pytest.approx(expected, rel=1e-5)


def test_one_order_only(maml: Maml) -> None:
    assert figures(maml, "--first_order", "true").keys() == {"first_order"}
    assert figures(maml, "--first_order", "false").keys() == {"second_order"}


def test_the_seed_draws_w0(maml: Maml) -> None:
    one, again, other = (figures(maml, "--seed", seed)["first_order"]["w0"] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--w0", "nan"], "w0 holds nan; it must be finite"),
        (["--support_y", "[0, inf]"], "support_y"),
        (["--query_x", "1e400"], "query_x"),
        (["--inner_steps", "-1"], "inner_steps"),
        (["--inner_lr", "0"], "inner_lr"),
        (["--support_x", "[1, 2]"], "support_y has 1 targets and support_x 2 points"),
        (["--w0", "one"], "w0 is one; it must be a number"),
        (["--dtype", "float16"], "dtype"),
        (["--seed", "-1"], "seed"),
        (["--w0", "1", "--inner_lr", "10", "--inner_steps", "100"], "inf in float32"),
        (
            ["--w0", "0", "--support_x", "1e20", "--first_order", "true"],
            "closed form of the query gradient is nan in float32",
        ),
        (
            ["--w0", "0", "--support_x", "1e20", "--first_order", "true", "--json"],
            "or set dtype to float64",
        ),
        (
            ["--support_x", "0", "--support_y", "1e20", "--json"],
            "support loss at inner step 1 is inf in float32",
        ),
        (["--graph", "picture.jpeg"], "picture.jpeg"),
        (["--graph", "/dev/null/picture.dot"], "/dev/null"),
        (["--unknown", "1"], "unknown"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, maml_error: Callable[..., str], tmp_path: Path
) -> None:
    assert message in maml_error("derive", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_dot_output_needs_no_graphviz_and_svg_says_what_to_install(
    maml: Maml, maml_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    maml("derive", "--graph", "graph.dot")
    assert (tmp_path / "graph.dot").read_text().startswith("digraph")
    assert "install" in maml_error("derive", "--graph", "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


@pytest.mark.integration
@pytest.mark.skipif(which("dot") is None, reason="Graphviz's dot is not installed")
@pytest.mark.parametrize("steps", [0, 1, 3, 50])
def test_the_graph_shows_both_orders(maml: Maml, tmp_path: Path, steps: int) -> None:
    maml("derive", "--w0", 1, "--inner_lr", 0.1, "--inner_steps", steps, "--graph", "graph.svg")
    svg = ElementTree.parse(tmp_path / "graph.svg").getroot()
    # The drawing uses the units of its viewBox, so nothing is cropped.
    drawing = svg.find("{*}g")
    assert drawing is not None
    assert "scale(1 1)" in drawing.attrib["transform"]
    picture = "".join(svg.itertext())
    assert "irst order" in picture
    assert "econd order" in picture
    maml("derive", "--w0", 1, "--inner_lr", 0.1, "--inner_steps", steps, "--graph", "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
