"""Losses and metrics: functions of (prediction, target) that return one number."""

from collections.abc import Mapping

from torch import Tensor, nn

from maml_pipeline.errors import UserError
from maml_pipeline.meta_gradient import Loss


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the fraction of correct answers: logits `(S, ways)`, labels `(S,)` -> scalar in [0, 1]."""
    return (logits.argmax(dim=-1) == labels).float().mean()


def measure_name(measure: Loss) -> str:
    """Return the name under which a loss or metric is logged: that of the function or class."""
    return getattr(measure, "__name__", type(measure).__name__.lower())


def check_measures(loss: Loss, metric: Loss | None) -> None:
    """Reject a loss or metric that cannot work with any task.

    Raises:
        UserError: It is not callable, has trainable parameters, or cannot be logged by name.
    """
    for key, measure in (("loss", loss), ("metric", metric)):
        if measure is None and key == "metric":
            continue
        if not callable(measure) or isinstance(measure, type):
            given = f"the class {measure.__name__}" if isinstance(measure, type) else repr(measure)
            raise UserError(
                f"{key} is {given}; it must be a function of (prediction, target), or an instance of a "
                "class like torch.nn.MSELoss"
            )
        if isinstance(measure, nn.Module) and any(p.requires_grad for p in measure.parameters()):
            raise UserError(
                f"{key} {measure_name(measure)} has trainable parameters, but only those of the network "
                "are meta-learned: move them into the network, or set requires_grad to False"
            )
    if metric is not None:
        name = measure_name(metric)
        if name == "loss":
            raise UserError("metric is named loss, like the loss; rename it")
        if not name.isidentifier():
            raise UserError(f"metric {name} has no name to log it under: define it with def")


class MeansOfMetaStep:
    """Means over the batches of a meta-step so far: several with `trainer.accumulate_grad_batches`."""

    def __init__(self) -> None:
        self._meta_step, self._batches = -1, 0
        self._sums: dict[str, Tensor] = {}

    def updated(
        self, meta_step: int, values: Mapping[str, Tensor], batches: int
    ) -> Mapping[str, Tensor]:
        """Return the means with those of one more batch, as large as the others.

        After the last batch nothing is kept: the next meta-step's memory begins without it.

        Args:
            meta_step: Number of the meta-step that the batch belongs to.
            values: The batch's means.
            batches: Number of batches of a meta-step.
        """
        if meta_step != self._meta_step:
            self._meta_step, self._batches, self._sums = meta_step, 0, {}
        self._batches += 1
        sums = {name: self._sums.get(name, 0) + value for name, value in values.items()}
        self._sums = sums if self._batches < batches else {}
        return {name: total / self._batches for name, total in sums.items()}
