"""Train until validation reaches 95 %, with this project and with a plain learn2learn loop.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.reproduce.time_to_accuracy        # a quarter of an hour on two cores
    python -m scripts.reproduce.time_to_accuracy --tiny    # a trial

Omniglot 5-way 1-shot in second order, with the settings of the config: the same tasks, the same Adam,
and validation on the same 200 tasks after every 100 meta-steps. The plain loop has PyTorch's own layers,
adapts with learn2learn in validation, too, and logs nothing; `maml fit` does all that it does otherwise.
Both times begin with the first meta-step. Both resume where they were stopped.

Writes results/time_to_accuracy.json and prints its table.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from maml_pipeline import run_folder
from maml_pipeline.learner import accuracy
from maml_pipeline.learner.data import EVALUATION_SEED
from maml_pipeline.meta_gradient import InnerLoop
from maml_pipeline.meta_gradient.learn2learn_engine import learn2learn_maml
from maml_pipeline.networks import ConvNet
from maml_pipeline.runs.find import find_runs
from maml_pipeline.tasks import Omniglot, Split, TaskBatch
from maml_pipeline.text import duration
from scripts.benchmark_peers import learn2learn_loop, with_native_layers
from scripts.reproduce.places import parse_places
from scripts.reproduce.results import training_seconds
from scripts.reproduce.training import read_origin, run_maml, write_origin

META_BATCH, EVALUATION_STEPS = 32, 3
INNER = InnerLoop(lr=0.4, steps=1)
THREADS = 2


class PlainLoop:
    """A plain training loop with learn2learn, whose state is on disk.

    Args:
        file: Where the state is.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.tasks = file, Omniglot(ways=5)
        torch.manual_seed(0)
        self.network = with_native_layers(ConvNet(ways=5))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, fused=True)
        self.curve: list[dict[str, float]] = []
        """Meta-steps, seconds so far, and accuracy, at each validation."""
        if file.exists():
            state = torch.load(file)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.curve = state["curve"]

    def train(self, target: float, every: int, most: int, validated: int) -> None:
        """Train until a validation reaches the target.

        Args:
            target: Accuracy.
            every: Meta-steps between validations.
            most: Meta-steps at most.
            validated: Validation tasks.
        """
        self._batch("train", 0, 1)  # loads the images
        last = self.curve[-1] if self.curve else {"meta_steps": 0, "seconds": 0.0, "accuracy": 0.0}
        done, reached = int(last["meta_steps"]), last["accuracy"]
        start = time.perf_counter() - last["seconds"]
        while done < most and reached < target:
            for meta_step in range(done, done + every):
                batch = self._batch("train", meta_step * META_BATCH, META_BATCH)
                self.optimizer.zero_grad()
                learn2learn_loop(self.network, cross_entropy, batch, INNER)
                self.optimizer.step()
            done += every
            reached = self.validate(validated)
            seconds = time.perf_counter() - start
            self.curve.append({"meta_steps": done, "seconds": seconds, "accuracy": reached})
            state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save({**state, "curve": self.curve}, self.file)
            print(
                f"plain loop: {done:,} meta-steps, {duration(seconds)}, {100 * reached:.1f} %",
                flush=True,
            )

    def validate(self, tasks: int) -> float:
        """Return the accuracy on the validation tasks."""
        maml = learn2learn_maml()(self.network, lr=INNER.lr, first_order=True)
        accuracies = []
        for task in self._batch("val", 0, tasks).tasks():
            learner = maml.clone()
            for _ in range(EVALUATION_STEPS):
                learner.adapt(cross_entropy(learner(task.support_x), task.support_y))
            with torch.no_grad():
                accuracies.append(float(accuracy(learner(task.query_x), task.query_y)))
        return sum(accuracies) / len(accuracies)

    def _batch(self, split: Split, first: int, tasks: int) -> TaskBatch:
        seed = EVALUATION_SEED if split == "val" else 0
        return self.tasks.batch(seed, split, range(first, first + tasks))


def train_plain_loop(folder: Path, settings: "Settings") -> dict[str, Any]:
    """Train the plain loop, and return its row."""
    torch.set_num_threads(THREADS)
    folder.mkdir(parents=True, exist_ok=True)
    loop = PlainLoop(folder / "state.pt")
    loop.train(**settings._asdict())
    write_origin(folder, THREADS)
    return {"name": "plain learn2learn loop", "curve": loop.curve, **read_origin(folder)}


def train_here(folder: Path, settings: "Settings") -> dict[str, Any]:
    """Train with `maml fit`, and return its row."""
    arguments = [
        *("fit", "--config=omniglot/5way_1shot", "--config=cpu", f"--run.dir={folder}"),
        *(f"--trainer.max_steps={settings.most}", f"--trainer.val_check_interval={settings.every}"),
        *(f"--data.val_tasks={settings.validated}", "--data.test_tasks=10"),
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/accuracy"),
        *("--trainer.callbacks.mode=max", f"--trainer.callbacks.patience={settings.most}"),
        f"--trainer.callbacks.stopping_threshold={settings.target}",
    ]
    if not (folder / run_folder.TEST).exists():
        resumes = run_folder.checkpoint_path(folder, "last").exists()
        run_maml([*arguments, *(["--ckpt_path=last"] if resumes else [])], THREADS)
        write_origin(folder, THREADS)
    (run,) = find_runs([folder]).runs
    curve = [{"meta_steps": step, "accuracy": value} for step, value in run.series("val/accuracy")]
    curve[-1]["seconds"] = training_seconds(run)
    return {"name": "maml fit", "curve": curve, **read_origin(folder)}


class Settings(NamedTuple):
    """What is trained: see `PlainLoop.train`."""

    target: float = 0.95
    every: int = 100
    most: int = 20_000
    validated: int = 200


TINY = Settings(target=0.3, every=2, most=6, validated=5)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/results.md."""
    lines = [
        "| Omniglot 5-way 1-shot | meta-steps | validation | time | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    longest = max(row["curve"][-1]["seconds"] for row in rows)
    for row in rows:
        last = row["curve"][-1]
        cells = (
            row["name"],
            f"{last['meta_steps']:,}",
            f"{100 * last['accuracy']:.1f} %",
            duration(last["seconds"]),
            f"{longest / last['seconds']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is not finished, write the results, and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    _, places = parse_places(parser, Path("runs/time_to_accuracy"), "time_to_accuracy.json")
    settings = TINY if places.is_trial else Settings()
    rows = [
        train_here(places.runs / "maml", settings),
        train_plain_loop(places.runs / "plain", settings),
    ]
    places.write(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
