"""Damaged and unusual run folders for the tests of `maml report`."""

import os
import shutil
from pathlib import Path

from tests.run_copies import (
    BINARY,
    Change,
    config,
    each,
    edit,
    metric,
    only_tradeoff_json,
    only_wandb_log,
    remove,
    replace,
    replace_folder,
    result,
    sparse,
    write,
)

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

LEFT_OUT: dict[str, tuple[Change, str]] = {
    # config.yaml
    "config-missing": (remove("config.yaml"), "no config.yaml"),
    "config-empty": (write("config.yaml", ""), "config.yaml is empty"),
    "config-blank": (write("config.yaml", " \n\n"), "config.yaml is empty"),
    "config-comment": (write("config.yaml", "# none\n"), "the config is empty"),
    "config-binary": (write("config.yaml", BINARY), "config.yaml is not YAML"),
    "config-nul": (write("config.yaml", bytes(100)), "config.yaml is not YAML"),
    "config-open-bracket": (write("config.yaml", "[1"), "config.yaml is not YAML"),
    "config-list": (write("config.yaml", "[1, 2]"), "its config has no run.experiment"),
    "config-text": (write("config.yaml", "hello"), "its config has no run.experiment"),
    "config-number": (write("config.yaml", "17"), "its config has no run.experiment"),
    "config-other": (write("config.yaml", "a: 1\n"), "its config has no run.experiment"),
    "config-cut": (edit("config.yaml", lambda text: text.partition("model:")[0]), "its config has no"),
    "config-cut-in-a-key": (edit("config.yaml", lambda text: text.partition("del:")[0]), "is not YAML"),
    "config-object": (write("config.yaml", "!!python/object:os.system ls"), "config.yaml is not YAML"),
    "config-bad-date": (write("config.yaml", "!!timestamp soon"), "config.yaml is not YAML"),
    "config-bad-float": (write("config.yaml", "a: !!float ''"), "config.yaml is not YAML"),
    "config-endless": (
        each(
            config("model.mine", 1),
            edit("config.yaml", lambda text: text.replace("mine: 1", "mine: &a {b: *a}")),
        ),
        "too deeply nested",
    ),
    "config-bomb": (edit("config.yaml", lambda text: text + BOMB), "too large or too deeply"),
    "config-deep": (write("config.yaml", "[" * 5000 + "]" * 5000), "config.yaml is not YAML"),
    "config-huge": (
        replace("config.yaml", sparse(10**12)),
        "config.yaml is larger than any",
    ),
    "config-folder": (replace("config.yaml", Path.mkdir), "config.yaml is not a file"),
    "config-pipe": (replace("config.yaml", os.mkfifo), "config.yaml is not a file"),
    "config-broken-link": (replace("config.yaml", lambda p: p.symlink_to("none")), "no config.yaml"),
    "config-looping-link": (replace("config.yaml", lambda p: p.symlink_to(p)), "no config.yaml"),
    "no-run": (config("run", ...), "its config has no run.experiment"),
    "run-list": (config("run", [1]), "its config has no run.experiment"),
    "experiment-list": (config("run.experiment", ["a"]), "run.experiment ['a'], not a name"),
    "no-model": (config("model", ...), "its config has no model.first_order"),
    "model-null": (config("model", None), "its config has no model.first_order"),
    "order-text": (config("model.first_order", "maybe"), "'maybe', not true or false"),
    "method-text": (config("model.method", "unknown"), "'unknown', not one of unrolled, checkpointed"),
    "method-list": (config("model.method", []), "[], not one of unrolled, checkpointed"),
    "truncation-text": (config("model.differentiated_steps", "a"), "differentiated_steps 'a', not a"),
    "no-inner-steps": (config("model.inner_steps", ...), "its config has no model.inner_steps"),
    "inner-steps-text": (config("model.inner_steps", "many"), "'many', not a number of steps"),
    "inner-steps-negative": (config("model.inner_steps", -1), "-1, not a number of steps"),
    "inner-steps-huge": (config("model.inner_steps", 10**40), "not a number of steps"),
    "inner-steps-float": (config("model.inner_steps", 1.5), "1.5, not a number of steps"),
    "seed-null": (config("seed_everything", None), "None, not a seed"),
    "seed-true": (config("seed_everything", True), "True, not a seed"),
    "no-trainer": (config("trainer", ...), "its config has no trainer.max_steps"),
    "max-steps-text": (config("trainer.max_steps", "all"), "not a number of meta-steps"),
    "max-steps-nan": (config("trainer.max_steps", float("nan")), "not a number of meta-steps"),
    "monitor-null": (config("run.monitor", None), "None, not a metric val/..."),
    "monitor-no-metric": (config("run.monitor", "val/"), "'val/', not a metric val/..."),
    "mode-other": (config("run.mode", "median"), "'median', not min or max"),
    "no-data": (config("data", ...), "its config has no data"),
    "data-list": (config("data", [1]), "not settings"),
    # metrics.csv
    "metrics-missing": (remove("metrics.csv"), "no metrics.csv: the run is just starting"),
    "metrics-empty": (write("metrics.csv", ""), "no row yet"),
    "metrics-header": (edit("metrics.csv", lambda text: text.splitlines()[0] + "\n"), "no row yet"),
    "metrics-half-header": (edit("metrics.csv", lambda text: text[:40]), "no row yet"),
    "metrics-binary": (write("metrics.csv", BINARY), "metrics.csv is damaged"),
    "metrics-nul": (write("metrics.csv", bytes(1000)), "no row yet"),
    "metrics-nul-lines": (
        write("metrics.csv", bytes(50) + b"\n" + bytes(50) + b"\n" + bytes(9) + b"\n"),
        "damaged",
    ),
    "metrics-no-step": (
        edit("metrics.csv", lambda text: text.replace(",step,", ",stop,", 1)),
        "is damaged",
    ),
    "metrics-text": (metric(2, "step", "ten"), "metrics.csv is damaged in line 3"),
    "metrics-text-value": (metric(3, "memory/parameters_bytes", "eight"), "is damaged in line 4"),
    "metrics-half-step": (metric(2, "step", "9.5"), "metrics.csv is damaged in line 3"),
    "metrics-huge-step": (metric(2, "step", "9" * 40), "logged at meta-step 9"),
    "metrics-more-cells": (
        edit("metrics.csv", lambda text: text.replace("\n", ",1,2\n", 2).replace(",1,2", "", 1)),
        "is damaged",
    ),
    "metrics-json": (write("metrics.csv", '{"a": 1}\n{"a": 2}\n{"a": 3}\n'), "is damaged"),
    "metrics-huge": (
        replace("metrics.csv", sparse(10**12)),
        "metrics.csv is larger than any",
    ),
    "metrics-folder": (replace("metrics.csv", Path.mkdir), "metrics.csv is not a file"),
    "metrics-pipe": (replace("metrics.csv", os.mkfifo), "metrics.csv is not a file"),
    "metrics-broken-link": (replace("metrics.csv", lambda p: p.symlink_to("none")), "no metrics.csv"),
    # test.json
    "test-empty": (write("test.json", ""), "test.json is empty"),
    "test-cut": (edit("test.json", lambda text: text[:30]), "test.json is not JSON"),
    "test-binary": (write("test.json", BINARY), "test.json is not JSON"),
    "test-list": (write("test.json", "[1]"), "has no metrics"),
    "test-number": (write("test.json", "0.5"), "has no metrics"),
    "test-null": (write("test.json", "null"), "has no metrics"),
    "test-no-metric": (write("test.json", "{}"), "test.json has no test/loss"),
    "test-no-monitored": (result(loss=...), "test.json has no test/loss"),
    "test-text": (result(loss="0.1"), "test/loss is '0.1', which is not a number"),
    "test-list-value": (result(loss_ci95=[1]), "test/loss_ci95 is [1], which is not a number"),
    "test-true": (result(loss=True), "test/loss is True, which is not a number"),
    "test-deep": (write("test.json", "[" * 100_000), "test.json is not JSON"),
    "test-folder": (replace("test.json", Path.mkdir), "test.json is not a file"),
    "test-pipe": (replace("test.json", os.mkfifo), "test.json is not a file"),
    # Whole folders
    "only-config": (
        each(*map(remove, ("metrics.csv", "test.json", "wandb", "wandb_id.txt"))),
        "no metrics.csv",
    ),
    "only-metrics": (
        each(*map(remove, ("config.yaml", "test.json", "wandb", "wandb_id.txt"))),
        "no config.yaml",
    ),
    "only-wandb-id": (
        each(*map(remove, ("config.yaml", "metrics.csv", "test.json", "wandb"))),
        "no config.yaml",
    ),
    "starting": (
        each(remove("metrics.csv"), remove("test.json")),
        "no metrics.csv: the run is just starting",
    ),
    "broken-link": (replace_folder(lambda run: run.symlink_to("none")), "broken link"),
    "looping-link": (replace_folder(lambda run: run.symlink_to(run)), "broken link"),
    # W&B's logs, and tradeoff.json
    "log-empty": (only_wandb_log(lambda log: b""), "has no metrics"),
    "log-cut": (only_wandb_log(lambda log: log[:900]), "has no metrics"),
    "log-text": (only_wandb_log(lambda log: b"no log" * 100), "cannot be read"),
    "log-binary": (only_wandb_log(lambda log: BINARY), "cannot be read"),
    "log-header": (only_wandb_log(lambda log: log[:7]), "has no metrics"),
    "tradeoff-empty": (only_tradeoff_json(""), "tradeoff.json is empty"),
    "tradeoff-binary": (only_tradeoff_json(BINARY), "tradeoff.json is not JSON"),
    "tradeoff-list": (only_tradeoff_json("[]"), "it is not a tradeoff.json"),
    "tradeoff-text-cells": (only_tradeoff_json('{"cells": "all"}'), "it is not a tradeoff.json"),
    "tradeoff-cut": (only_tradeoff_json('{"cells": [{"con'), "tradeoff.json is not JSON"),
    "tradeoff-text-cell": (only_tradeoff_json('{"cells": ["first"]}'), "not a cell"),
    "tradeoff-empty-cell": (only_tradeoff_json('{"cells": [{}]}'), "not a cell"),
    "tradeoff-no-config": (
        only_tradeoff_json('{"cells": [{"config": null, "history": [], "test": {}}]}'),
        "the config is empty",
    ),
}

REPORTED: dict[str, Change] = {
    "checkpoints-missing": lambda run: shutil.rmtree(run / "checkpoints", ignore_errors=True),
    "wandb-missing": remove("wandb"),
    "wandb-empty": replace("wandb", Path.mkdir),
    "wandb-file": replace("wandb", lambda path: path.write_text("")),
    "wandb-id-empty": write("wandb_id.txt", ""),
    "metrics-cut": edit("metrics.csv", lambda text: text[:-20]),
    "metrics-cut-at-a-number": edit("metrics.csv", lambda text: text.rstrip()),
    "metrics-duplicate-column": edit(
        "metrics.csv", lambda text: text.replace("speed/flops_per_second", "speed/meta_step_ms")
    ),
    "metrics-nan": metric(2, "speed/meta_step_ms", "nan"),
    "metrics-inf": metric(2, "speed/meta_step_flops", "inf"),
    "metrics-huge-value": metric(3, "memory/meta_step_peak_bytes", "1" + 400 * "0"),
    "metrics-negative-memory": metric(3, "memory/meta_step_peak_bytes", "-5"),
    "metrics-no-memory": metric(3, "memory/meta_step_peak_bytes", "0"),
    "metrics-text-unread": edit("metrics.csv", lambda text: text + "half a r"),
    "test-nan": result(loss=float("nan"), loss_ci95=float("nan")),
    "test-inf": result(loss=float("inf")),
    "test-largest": result(loss=1.7e308, loss_step_3=1.7e308, loss_ci95=1.7e308),
    "test-negative-interval": result(loss_ci95=-1.0),
    "test-no-interval": result(loss_ci95=..., loss_step_1_ci95=...),
    "test-one-step": result(loss_step_1=...),
    "killed": remove("test.json"),
    "endless": config("trainer.max_steps", -1),
    "no-name": config("run.experiment", None),
}
"""Unusual but valid runs, which are reported without a message."""
