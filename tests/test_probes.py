"""Probes run at their meta-steps and never change training, also after resuming."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from maml_pipeline import MetaLearner, TaskDataModule
from maml_pipeline.errors import UserError
from maml_pipeline.learner.probes import MemoryProbe, OrderGapProbe, ProbeSettings, SpeedProbe
from maml_pipeline.networks import MLP
from maml_pipeline.tasks import Lines, SineWaves
from tests.helpers import TIMINGS, make_trainer, network_weights
from tests.probed_training import ENGINES, ORDERS, Figures, MetricsInMemory, train


def test_probes_run_at_meta_step_10_and_every_multiple_of_every() -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(learner, Lines(), ProbeSettings(every=12), steps=40)
    assert [step + 1 for step in figures] == [10, 12, 24, 36]
    names = [{name.split("/")[0] for name in found} for found in figures.values()]
    assert all(found == {"memory", "speed", "order_gap"} for found in names)


@pytest.mark.parametrize("probe", ["memory", "speed", "order_gap"])
def test_each_probe_can_be_disabled(probe: str) -> None:
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    figures = train(learner, Lines(), ProbeSettings(**{probe: False}))
    assert {name.split("/")[0] for name in figures[9]} == {"memory", "speed", "order_gap"} - {probe}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ORDERS)
def test_probes_never_change_the_weights(order: str, engine: Any, accumulate: int) -> None:
    def trained(settings: ProbeSettings) -> Tensor:
        torch.manual_seed(0)
        learner = MetaLearner(MLP(), loss=mse_loss, inner_lr=0.01, engine=engine, **ORDERS[order])
        train(
            *(learner, SineWaves(), settings),
            steps=16,
            meta_batch_size=3,
            accumulate_grad_batches=accumulate,
        )
        return network_weights(learner)

    nothing = ProbeSettings(memory=False, speed=False, order_gap=False)
    assert torch.equal(trained(ProbeSettings(every=5)), trained(nothing))


def test_probes_never_change_random_numbers() -> None:
    def trained(settings: ProbeSettings) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(
            *(
                nn.Linear(1, 8),
                nn.BatchNorm1d(8, track_running_stats=False),
                nn.Dropout(0.5),
                nn.Tanh(),
                nn.Linear(8, 1),
            )
        )
        # The vectorized engine refuses dropout.
        learner = MetaLearner(network, loss=mse_loss, inner_lr=0.01, engine="learn2learn")
        train(learner, SineWaves(), settings, steps=12)
        return [*network.state_dict().values()]

    # All probes at every meta-step, compared with probes that run once.
    states = trained(ProbeSettings(every=1)), trained(ProbeSettings(every=10**6, order_gap=False))
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_settings_out_of_range_are_rejected() -> None:
    with pytest.raises(UserError, match=r"probes\.every is 0; it must be 1 or more"):
        ProbeSettings(every=0)


@pytest.mark.parametrize("probe", [MemoryProbe, SpeedProbe, OrderGapProbe])
def test_a_probe_works_with_any_trainer(probe: Any) -> None:
    logger = MetricsInMemory()
    lightning = make_trainer(
        max_steps=10, logger=logger, callbacks=[probe(every=10)], limit_val_batches=0
    )
    learner = MetaLearner(nn.Linear(1, 1), loss=mse_loss, inner_lr=0.1)
    lightning.fit(learner, datamodule=TaskDataModule(Lines(), 2))
    assert any("/" in name and not name.startswith("train") for name in logger.figures[9])


class SaveAt(Callback):
    """Saves a checkpoint after each of the given meta-steps."""

    def __init__(self, folder: Path, meta_steps: Sequence[int]) -> None:
        self.folder = folder
        self.meta_steps = meta_steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step in self.meta_steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.integration
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", [lambda: nn.Linear(1, 1), MLP])
def test_a_resumed_run_logs_the_same_probes_as_an_uninterrupted_one(
    tmp_path: Path, network: Any, engine: Any, order: str
) -> None:
    starts = range(5, 13)  # before, at and after the probe steps 6, 10 and 12

    def run(callbacks: Sequence[Callback], start: int | None = None) -> tuple[Figures, list[Tensor]]:
        torch.manual_seed(0)
        logger = MetricsInMemory()
        lightning = make_trainer(
            max_steps=18,
            logger=logger,
            limit_val_batches=0,
            callbacks=[*ProbeSettings(every=6).callbacks(), *callbacks],
        )
        learner = MetaLearner(network(), loss=mse_loss, inner_lr=0.01, engine=engine, **ORDERS[order])
        lightning.fit(
            learner,
            datamodule=TaskDataModule(SineWaves(), 3),
            ckpt_path=None if start is None else tmp_path / f"{start}.ckpt",
            weights_only=True,
        )
        return logger.figures, [p.detach().clone() for p in learner.parameters()]

    whole, trained = run([SaveAt(tmp_path, starts)])
    assert [step for step in whole if "order_gap/cosine" in whole[step]] == [5, 9, 11, 17]
    for start in starts:
        figures, weights = run([], start)
        assert all(map(torch.equal, weights, trained))
        for step in range(start, 18):
            assert _without_time(figures, step) == _without_time(whole, step)


def _without_time(figures: Figures, step: int) -> dict[str, float]:
    probed = ("memory/", "speed/", "order_gap/")
    return {
        name: 0.0 if name in TIMINGS else value
        for name, value in figures.get(step, {}).items()
        if name.startswith(probed)
    }
