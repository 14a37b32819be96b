"""What the resolved config of a run says about it, beyond its keys."""

from typing import Any

from maml_pipeline.gradient_order import Method


def experiment_name(config: dict[str, Any]) -> str:
    """Return the experiment of a resolved config: `run.experiment`, or the name of its tasks."""
    name = config["run"]["experiment"]
    if name is None:
        name = str(config["data"]["tasks"]["class_path"]).rpartition(".")[2].lower()
    return str(name)


def gradient_method(config: dict[str, Any]) -> Method:
    """Return the method by which a resolved config computes meta-gradients."""
    return Method.of(config["model"]["first_order"], config["model"]["checkpoint_inner_steps"])
