"""MAML on the sine network in JAX, for `benchmark_engines.py`: jit, vmap and optax, in float32."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.tasks import TaskBatch

Parameters = list[tuple[Any, Any]]


def limit_threads(threads: int) -> None:
    """Set the number of CPU threads of JAX; call it before JAX is imported."""
    os.environ["NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


class JaxMaml:
    """Meta-steps in JAX; the meta-gradient and the Adam step are one compiled function.

    Args:
        network: Linear layers with ReLU in between; supplies the initial parameters.
        inner: Inner learning rate, steps and gradient order; the loss is the mean squared error.
        draw: Draws the tasks of a meta-step.
    """

    def __init__(
        self, network: nn.Sequential, inner: InnerLoop, draw: Callable[[int], TaskBatch]
    ) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        def predict(theta: Parameters, x: Any) -> Any:
            for weight, bias in theta[:-1]:
                x = jax.nn.relu(x @ weight.T + bias)
            weight, bias = theta[-1]
            return x @ weight.T + bias

        def loss(theta: Parameters, x: Any, y: Any) -> Any:
            return jnp.mean((predict(theta, x) - y) ** 2)

        def adapted_loss(theta: Parameters, support_x: Any, support_y: Any, x: Any, y: Any) -> Any:
            for _ in range(inner.steps):
                step = jax.grad(loss)(theta, support_x, support_y)
                if inner.first_order:
                    step = jax.lax.stop_gradient(step)
                theta = jax.tree.map(lambda p, g: p - inner.lr * g, theta, step)
            return loss(theta, x, y)

        def meta_loss(theta: Parameters, batch: Any) -> Any:
            return jnp.mean(jax.vmap(adapted_loss, in_axes=(None, 0, 0, 0, 0))(theta, *batch))

        adam = optax.adam(1e-3)

        def meta_step(theta: Parameters, state: Any, batch: Any) -> tuple[Parameters, Any]:
            updates, state = adam.update(jax.grad(meta_loss)(theta, batch), state)
            return optax.apply_updates(theta, updates), state

        self._draw = draw
        self._taken = 0
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        assert all(isinstance(layer, nn.Linear | nn.ReLU) for layer in network)
        self._theta: Parameters = [(_array(layer.weight), _array(layer.bias)) for layer in linear]
        self._state = adam.init(self._theta)
        self._meta_step = jax.jit(meta_step, donate_argnums=(0, 1))
        self._gradient = jax.jit(jax.grad(meta_loss))
        self._wait: Callable[[Any], Any] = jax.block_until_ready

    def take(self, steps: int) -> list[float]:
        """Take meta-steps and return the seconds of each: drawing tasks, meta-gradient and Adam step."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._taken += 1
            batch = tuple(tensor.numpy() for tensor in self._draw(self._taken))
            self._theta, self._state = self._meta_step(self._theta, self._state, batch)
            self._wait(self._theta)
            seconds.append(time.perf_counter() - start)
        return seconds

    def meta_gradient(self, batch: TaskBatch) -> Tensor:
        """Compute the meta-gradient at the current parameters in float64, flattened."""
        import jax

        with jax.enable_x64(True):
            theta = jax.tree.map(lambda parameter: parameter.astype("float64"), self._theta)
            gradient = self._gradient(theta, tuple(tensor.double().numpy() for tensor in batch))
            parts = [part.tolist() for pair in gradient for part in pair]
        return torch.cat([torch.tensor(part, dtype=torch.float64).flatten() for part in parts])


def _array(parameter: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.array(parameter.detach().numpy())
