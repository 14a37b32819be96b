"""The help of `maml fit | validate | test`: the keys of this project, with defaults, on two screens.

The texts and defaults stand here, so that help needs no PyTorch; tests/test_help.py compares them with
the parser. `--help all` prints every key from the parser itself.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, NoReturn

from maml_pipeline.cli.parser import Parser


class Key(NamedTuple):
    """A key of the configuration.

    Args:
        name: Its name on the command line, without dashes.
        default: Its default as text, and after a colon what `null` means; empty where it has none.
        text: What it sets.
        only_fit: Whether `validate` and `test` have no use for it.
    """

    name: str
    default: str
    text: str
    only_fit: bool = False


GROUPS: dict[str, tuple[Key, ...]] = {
    "tasks": (
        Key("data.tasks", "", "class: maml_pipeline.tasks.Omniglot, ..."),
        Key("data.tasks.ways", "5", "classes per task (Omniglot)"),
        Key("data.tasks.shots", "", "support points per task (Omniglot: per class)"),
        Key("data.tasks.query_shots", "", "query points per task (Omniglot: per class)"),
        Key("data.meta_batch_size", "32", "tasks per meta-step, on all devices", True),
        Key("data.val_tasks", "100", "validation tasks"),
        Key("data.test_tasks", "1000", "test tasks"),
        Key("data.num_workers", "0", "data-loading processes per device"),
    ),
    "model": (
        Key("model.network", "", "class: maml_pipeline.networks.MLP, ..."),
        Key("model.network.ways", "", "outputs of a ConvNet; must equal data.tasks.ways"),
        Key("model.loss", "", "function: torch.nn.functional.mse_loss, ..."),
        Key("model.metric", "null", "second measure: maml_pipeline.learner.accuracy, ..."),
        Key("model.inner_lr", "", "inner learning rate alpha"),
        Key(
            "model.learned_inner_lr.lr", "null", "meta-learn a rate per parameter and step, with this lr"
        ),
        Key("model.inner_steps", "1", "inner steps in training"),
        Key("model.eval_inner_steps", "null: inner_steps", "inner steps in evaluation"),
        Key("model.adapt", "null: all", "parameters that inner steps move: [head.*], ..."),
        Key("model.transductive", "true", "evaluate a query set as one batch"),
        Key("model.first_order", "false", "use first-order meta-gradients", True),
        Key("model.differentiated_steps", "null: all", "last inner steps that are differentiated", True),
        Key("model.method", "unrolled", "or checkpointed, hessian_free: for less memory", True),
        Key("model.first_order_meta_steps", "0", "initial meta-steps that use first order", True),
        Key(
            "model.engine",
            "native",
            "native: the fastest; vectorized: all tasks at once; or learn2learn",
        ),
        Key("model.tasks_per_chunk", "null: all", "vectorized: tasks at once, or auto"),
        Key("model.optimizer", "Adam", "class of the outer optimizer", True),
        Key("model.optimizer.lr", "", "outer learning rate", True),
        Key("model.lr_scheduler", "null", "class of the outer schedule", True),
    ),
    "run": (
        Key("config", "", "YAML file; later files override earlier ones"),
        Key("ckpt_path", "null", "start from best, last or a file"),
        Key("seed_everything", "0", "seed of parameters and training tasks"),
        Key("run.dir", "null: runs/<name>", "run folder"),
        Key("run.experiment", "null: the tasks' name", "first part of the run's name"),
        Key("run.checkpoint_every", "500", "meta-steps between writes of last.ckpt", True),
        Key("run.monitor", "val/loss", "metric that selects best.ckpt", True),
        Key("run.mode", "min", "whether its min or max is best", True),
        Key("run.artifacts", "null: if online", "upload best.ckpt and a report to W&B", True),
        Key("run.varied", "null", "keys whose best value a report chooses", True),
    ),
    "probes": (
        Key("probes.every", "500", "meta-steps between measurements", True),
        Key("probes.memory", "true", "measure peak memory", True),
        Key("probes.speed", "true", "measure time and FLOPs", True),
        Key("probes.order_gap", "true", "compare both orders' meta-gradients", True),
    ),
    "trainer": (
        Key("trainer.max_steps", "-1", "meta-steps; -1: no limit", True),
        Key("trainer.max_time", "null", "time limit, DD:HH:MM:SS", True),
        Key("trainer.val_check_interval", "500", "meta-steps between validations", True),
        Key("trainer.log_every_n_steps", "null: 50", "meta-steps between logged rows", True),
        Key("trainer.accelerator", "auto", "cpu, gpu or auto"),
        Key("trainer.devices", "auto", "devices per node: a number or a list"),
        Key("trainer.num_nodes", "1", "nodes"),
        Key("trainer.precision", "null: 32-true", "bf16-mixed, 64-true, ..."),
        Key("trainer.gradient_clip_val", "null", "clip the meta-gradient's norm", True),
        Key("trainer.callbacks", "null", "such as EarlyStopping", True),
        Key("trainer.enable_progress_bar", "null: true", "show progress"),
    ),
}

EVALUATED = {
    "ckpt_path": Key(
        "ckpt_path",
        "null: best if --config is a run's, else none",
        "evaluate best, last or a file; none: the initial parameters",
    ),
}
"""Keys that mean something else for `validate` and `test`."""

DESCRIPTIONS = {
    "fit": "Meta-train, then test the best checkpoint.",
    "validate": "Evaluate a checkpoint on the validation tasks.",
    "test": "Evaluate a checkpoint on the test tasks.",
}
EXAMPLES = {
    "fit": (
        "maml fit --config toy --data.tasks.shots 10",
        "maml fit --config runs/toy-second-s0/config.yaml --ckpt_path last",
    ),
    "validate": ("maml validate --config runs/toy-second-s0/config.yaml",),
    "test": ("maml test --config runs/toy-second-s0/config.yaml",),
}


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for the short help: `--help` or `-h`, without `all`."""
    return any(argument in HELP_FLAGS for argument in arguments) and not asks_for_all(arguments)


def asks_for_all(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for every key: `--help all`."""
    pairs = pairwise(arguments)
    return any(flag in HELP_FLAGS and value == "all" for flag, value in pairs)


HELP_FLAGS = ("--help", "-h")


def run(command: str) -> NoReturn:
    """Print the help of a command, and exit.

    Args:
        command: `fit`, `validate` or `test`.
    """
    parser = _parser(command)
    parser.print_help()
    parser.exit()


def usage(command: str) -> str:
    """Return the usage line of a command."""
    return f"maml {command} --config FILE [--config OVERLAY] [--KEY VALUE ...]"


def _evaluation_keys(keys: Sequence[Key]) -> list[Key]:
    """Return the keys of `validate` and `test`."""
    return [EVALUATED.get(key.name, key) for key in keys if not key.only_fit]


def _parser(command: str) -> Parser:
    """Return a parser of the keys in `GROUPS`, which is used for its help alone."""
    parser = Parser(
        prog=f"maml {command}",
        usage=usage(command),
        description=f"{DESCRIPTIONS[command]} Keys come from config files and the command line, which "
        "takes precedence. [Defaults] are in brackets.",
        examples=EXAMPLES[command],
        add_help=False,
    )
    for title, keys in GROUPS.items():
        shown = [*keys] if command == "fit" else _evaluation_keys(keys)
        group = parser.add_argument_group(title) if shown else None
        for key in shown:
            default = f" [{key.default}]" if key.default else ""
            assert group is not None
            group.add_argument(f"--{key.name}", metavar="", help=key.text + default)
    more = parser.add_argument_group("more")
    more.add_argument("--help all", metavar="", help="every key, including Lightning's")
    more.add_argument("--KEY.help CLASS", metavar="", help="the arguments of a class")
    more.add_argument("--print_config", metavar="", help="print the resolved config and exit")
    parser.epilog = (
        "The arguments of a class are keys below its own, listed by, for example,\n"
        f"`maml {command} --model.optimizer.help torch.optim.SGD`."
    )
    return parser
