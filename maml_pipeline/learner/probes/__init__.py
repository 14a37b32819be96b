"""Probes: callbacks that measure the cost and the error of a gradient order, and change nothing."""

from dataclasses import dataclass

from maml_pipeline.errors import UserError
from maml_pipeline.learner.probes.memory import MemoryProbe
from maml_pipeline.learner.probes.order_gap import OrderGapProbe
from maml_pipeline.learner.probes.probe import Probe
from maml_pipeline.learner.probes.speed import SpeedProbe

__all__ = ["MemoryProbe", "OrderGapProbe", "Probe", "ProbeSettings", "SpeedProbe"]


@dataclass
class ProbeSettings:
    """What to measure during training besides losses; docs/metrics.md lists the metrics.

    Args:
        every: Meta-steps between two measurements; the first is at the tenth meta-step.
        memory: Measure the peak memory of a meta-step.
        speed: Measure the time of a meta-step, tasks per second and FLOPs.
        order_gap: Compare both orders' meta-gradients. Needs about the memory of checkpointed inner
            steps, also in a first-order run.
    """

    every: int = 500
    memory: bool = True
    speed: bool = True
    order_gap: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(
                f"probes.every is {self.every}; it must be 1 or more (to measure nothing, set "
                "probes.memory, probes.speed and probes.order_gap to false)"
            )

    def callbacks(self) -> list[Probe]:
        """Build the requested probes, in the order in which they disturb each other least."""
        probes = (
            (self.order_gap, OrderGapProbe),
            (self.speed, SpeedProbe),
            (self.memory, MemoryProbe),
        )
        return [probe(self.every) for is_requested, probe in probes if is_requested]
