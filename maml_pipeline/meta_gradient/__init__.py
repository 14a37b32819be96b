"""How one meta-gradient is computed, and how one adapted network is judged, in plain PyTorch."""

from typing import Literal

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient.inner_loop import Engine, InnerLoop, Loss, MetaGradient
from maml_pipeline.meta_gradient.learn2learn_engine import Learn2LearnEngine
from maml_pipeline.meta_gradient.observation import initialise_lazy
from maml_pipeline.meta_gradient.order import GradientOrder, Method
from maml_pipeline.meta_gradient.vectorized_engine import VectorizedEngine

__all__ = [
    "Engine",
    "GradientOrder",
    "InnerLoop",
    "Learn2LearnEngine",
    "Loss",
    "MetaGradient",
    "Method",
    "VectorizedEngine",
    "build_engine",
    "initialise_lazy",
]


def build_engine(
    name: Literal["learn2learn", "vectorized"],
    tasks_per_chunk: int | Literal["auto"] | None = None,
    compile: bool = False,
) -> Engine:
    """Build an engine from a config's keys.

    Raises:
        UserError: There is no such engine, or a setting is not one of its.
    """
    if name == "vectorized":
        return VectorizedEngine(tasks_per_chunk, compile)
    if name != "learn2learn":
        raise UserError(f"engine is {name}; it must be learn2learn or vectorized")
    if tasks_per_chunk is not None:
        raise UserError(
            f"tasks_per_chunk is {tasks_per_chunk}, but engine learn2learn adapts one task at a time: "
            "leave it out, or set engine to vectorized"
        )
    if compile:
        raise UserError(
            "compile is true, but engine learn2learn cannot be compiled: set engine to vectorized"
        )
    return Learn2LearnEngine()
