"""Train sine waves at the scale of the MAML paper, with the baselines that it compares with.

    python -m scripts.reproduce.sine                   # all of it: half an hour on two cores
    python -m scripts.reproduce.sine --only sine-5shot-oracle
    python -m scripts.reproduce.sine --read            # nothing is trained
    python -m scripts.reproduce.sine --tiny            # a trial

The checkpoint that is tested is the one whose loss on 500 validation tasks is lowest after as many inner
steps as were trained; after ten for the pre-trained network, which was trained without any. A loss after
more steps, at which a few tasks of a network that was trained for one step may diverge, would choose by
luck.

What is finished is not trained again: after an interruption, the same command resumes. Writes
results/sine.json and docs/sine.png, and prints the table of docs/results.md.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from maml_pipeline import MetaLearner
from maml_pipeline.files import write_atomically
from maml_pipeline.report.page import render_figure
from maml_pipeline.report.style import add_legend, plot_style
from maml_pipeline.tasks import RevealedSineWaves
from scripts.reproduce.results import reproduce, rows_of
from scripts.reproduce.training import Training

STEPS = (0, 1, 5, 10)
PUBLISHED = {
    "second": {1: 0.67, 5: 0.38, 10: 0.35},
    "pre-trained": {1: 2.41, 5: 2.23, 10: 2.19},
}
"""Mean squared errors with 5 shots, by inner steps: Finn et al. 2017, appendix."""

PICTURE = Path("docs/sine.png")

COMMON = (
    *("--config=sine", "--config=cpu", "--data.val_tasks=500", "--seeds=0,1,2", "--parallel=2"),
    "--probes.every=10000",
)
TINY = (
    *("--trainer.max_steps=20", "--trainer.val_check_interval=10", "--probes.every=10"),
    *("--data.val_tasks=10", "--data.test_tasks=20"),
)


def _trainings(shots: int) -> list[Training]:
    task, name = f"sine, {shots} shots", f"sine-{shots}shot"
    flags = (*COMMON, f"--data.tasks.init_args.shots={shots}")
    published = {label: {label: PUBLISHED[label]} if shots == 5 else {} for label in PUBLISHED}
    return [
        Training(
            name, task, {"first": "first", "second": "second"},
            (*flags, "--run.monitor=val/loss_step_1"), tiny=TINY, published=published["second"],
        ),
        # Without an inner step, the meta-gradient is that of all tasks at the initial parameters.
        Training(
            f"{name}-pretrained", task, {"second": "pre-trained"},
            (*flags, "--inner_steps=0", "--vary=model.inner_lr=0.001,0.003,0.01",
             f"--run.experiment={name}-pretrained"),
            tiny=TINY, published=published["pre-trained"],
        ),
        Training(
            f"{name}-oracle", task, {"second": "oracle"},
            (*flags, "--inner_steps=0", "--model.eval_inner_steps=0",
             "--data.tasks=maml_pipeline.tasks.RevealedSineWaves",
             f"--data.tasks.init_args.shots={shots}", "--model.network.init_args.in_features=3"),
            tiny=TINY,
        ),
    ]  # fmt: skip


TRAININGS = [training for shots in (5, 10) for training in _trainings(shots)]


def draw_adaptation(runs: Path) -> Figure:
    """Draw how networks adapt to five points of one sine wave, as in figure 2 of the paper.

    Args:
        runs: Where the runs with five shots are.
    """
    (task,) = RevealedSineWaves(shots=5).batch(seed=0, split="test", indices=[0]).tasks()
    points, (_, amplitude, phase) = task.support_x[:, :1], task.support_x[0].tolist()
    x = torch.linspace(-5, 5, 201)[:, None]
    panels = {
        "MAML, second order": _run(runs / "sine-5shot", "second"),
        "MAML, first order": _run(runs / "sine-5shot", "first"),
        "pre-trained on all tasks": _run(runs / "sine-5shot-pretrained", "second"),
    }
    with plot_style():
        figure = Figure((8.2, 3.0), layout="constrained")
        for ax, (title, folder) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            learner = MetaLearner.from_run(folder)
            ax.plot(x, amplitude * (x - phase).sin(), color="#999999", label="the sine wave")
            for steps, line in {0: ":", 1: "--", 10: "-"}.items():
                model = learner.adapt(points, task.support_y, steps=steps)
                with torch.no_grad():
                    label = f"after {steps} inner step{'s' if steps != 1 else ''}"
                    ax.plot(x, model(x), line, color="#D55E00", label=label)
            ax.plot(points, task.support_y, "o", color="#0072B2", label="the five points")
            ax.set_title(title)
            ax.set_xlabel("x")
        add_legend(figure, title="")
    return figure


def _run(folder: Path, order: str) -> Path:
    """Return the folder of an order's first seed in a trade-off, with the value that was chosen."""
    rows = (row for row in rows_of(folder) if str(row.order) == order and not row.is_outdone)
    return next(rows).runs[0].source


def main() -> None:
    """Train, write the results, and draw."""
    places = reproduce(__doc__ or "", TRAININGS, STEPS, "sine.json")
    if all(training.is_finished(places.runs) for training in TRAININGS[:2]):
        picture = render_figure(draw_adaptation(places.runs), "png")
        write_atomically(places.picture(PICTURE), picture)


if __name__ == "__main__":
    main()
