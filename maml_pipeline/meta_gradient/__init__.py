"""Meta-gradients in plain PyTorch: engines, gradient orders and methods.

One meta-gradient, from the learner down:

    MetaLearner.training_step              learner/meta_learner.py
    +- Engine.meta_gradient                engine.py
    |  +- verified_workarounds             exactness/: compare with plain autograd, once per network
    |  +- VectorizedEngine._meta_gradient  vectorized_engine.py; on a GPU captured and replayed as a
    |  |  |                                   CUDA graph, captured.py; for each chunk of tasks:
    |  |  +- chunk_gradient                methods.py
    |  |     +- first_order                   adapt, then the query gradient
    |  |     +- unrolled                      differentiate through the graph of inner steps
    |  |     +- checkpointed               checkpointed.py: adapt without a graph, carry the adjoint back
    |  |     |  +- reverse_sweep              one Hessian-vector product per step
    |  |     +- hessian_free               hessian_free.py: the same with differences of gradients
    |  +- Learn2LearnEngine._meta_gradient learn2learn_engine.py, for each task: a clone of learn2learn's
    |                                         MAML; `checkpointed` and `hessian_free` as above
    |  +- NativeEngine._meta_gradient      native_engine.py: machine code for the networks that it knows,
    |                                         native/; anything else as VectorizedEngine
    +- loss_with_gradient                  learner/: a loss whose backward puts the gradient into .grad
"""

from typing import Literal

from maml_pipeline.errors import UserError
from maml_pipeline.gradient_order import GradientOrder, Method
from maml_pipeline.meta_gradient.engine import Engine, MetaGradient
from maml_pipeline.meta_gradient.exactness import initialise_lazy
from maml_pipeline.meta_gradient.inner_loop import InnerLoop, Loss
from maml_pipeline.meta_gradient.learn2learn_engine import Learn2LearnEngine
from maml_pipeline.meta_gradient.native_engine import NativeEngine
from maml_pipeline.meta_gradient.vectorized_engine import VectorizedEngine

__all__ = [
    "Engine",
    "GradientOrder",
    "InnerLoop",
    "Learn2LearnEngine",
    "Loss",
    "MetaGradient",
    "Method",
    "NativeEngine",
    "VectorizedEngine",
    "build_engine",
    "initialise_lazy",
]


def build_engine(
    name: Literal["native", "vectorized", "learn2learn"],
    tasks_per_chunk: int | Literal["auto"] | None = None,
) -> Engine:
    """Build an engine from the keys of a config.

    Args:
        name: Name of the engine.
        tasks_per_chunk: See `VectorizedEngine`.

    Raises:
        UserError: The engine does not exist, does not have one of the settings, or is not installed.
    """
    if name == "native":
        return NativeEngine(tasks_per_chunk)
    if name == "vectorized":
        return VectorizedEngine(tasks_per_chunk)
    if name != "learn2learn":
        raise UserError(f"engine is {name}; it must be native, vectorized or learn2learn")
    if tasks_per_chunk is not None:
        raise UserError(
            f"tasks_per_chunk is {tasks_per_chunk}, but engine learn2learn adapts one task at a time: "
            "leave it out, or set engine to native"
        )
    return Learn2LearnEngine()
