"""What the resolved config of a run says about it, beyond its keys."""

from typing import Any

from maml_pipeline.gradient_order import GradientOrder, Method


def experiment_name(config: dict[str, Any]) -> str:
    """Return the experiment of a resolved config: `run.experiment`, or the name of its tasks."""
    name = config["run"]["experiment"]
    if name is None:
        name = str(config["data"]["tasks"]["class_path"]).rpartition(".")[2].lower()
    return str(name)


def gradient_order(config: dict[str, Any]) -> GradientOrder:
    """Return the gradient order of a resolved config; one of an older version has no truncation."""
    model = config["model"]
    steps = model.get("differentiated_steps")
    return GradientOrder(model["first_order"], steps, Method(model["method"]))
