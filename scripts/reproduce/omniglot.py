"""Train Omniglot with each order at its own best inner learning rate, in half an hour on two cores.

    export MAML_OMNIGLOT_ROOT=data/omniglot
    python -m scripts.reproduce.omniglot                # all of it
    python -m scripts.reproduce.omniglot --read         # nothing is trained
    python -m scripts.reproduce.omniglot --tiny --runs /tmp/runs --results /tmp/o.json    # a trial

The inner learning rate is chosen on validation characters by shorter runs; the test characters are
looked at once. What is finished is not trained again: after an interruption, the same command resumes.
Writes results/omniglot.json, and prints the table of docs/results.md.
"""

from scripts.reproduce.training import Training, reproduce

STEPS = (0, 1, 3, 5)
TINY = (
    *("--trainer.max_steps=6", "--trainer.val_check_interval=3", "--probes.every=3"),
    *("--data.val_tasks=5", "--data.test_tasks=10", "--data.meta_batch_size=2"),
)
TRAININGS = [
    Training(
        name="omniglot-5w1s",
        task="Omniglot 5-way 1-shot",
        methods={"first": "first", "second": "second"},
        flags=("--config=omniglot/5way_1shot", "--config=cpu"),
        search=(
            *("--vary=model.inner_lr=0.1,0.4,1.0", "--trainer.max_steps=500"),
            "--trainer.val_check_interval=100",
        ),
        final=("--seeds=0", "--trainer.max_steps=10000", "--probes.every=1000"),
        tiny=TINY,
        # Finn et al. 2017, table 1; first order: Nichol et al. 2018, table 2.
        published={"first": {3: 0.983}, "second": {3: 0.987}},
        threads=2,
    ),
]


if __name__ == "__main__":
    reproduce(__doc__ or "", TRAININGS, STEPS, "omniglot.json")
