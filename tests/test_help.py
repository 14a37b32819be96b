"""Every command has readable help, and unknown keys get suggestions."""

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from maml_pipeline.cli import COMMANDS, main, training_help
from maml_pipeline.cli.jsonargparse_internals import parser_keys
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.cli.suggestions import ALIASES, ALTERNATIVES, SETTINGS, suggest
from maml_pipeline.tradeoff.grid import ORDER_NAMES
from tests.helpers import CONFIGS

pytestmark = pytest.mark.integration

Maml = Callable[..., str]

MAX_LINES = 100
TOY = ("--config", str(CONFIGS / "toy.yaml"))
OMNIGLOT = ("--config", str(CONFIGS / "omniglot" / "5way_1shot.yaml"))
OF_A_CLASS = ("data.tasks.", "model.learned_inner_lr.", "model.network.", "model.optimizer.")
VALUES = {
    "seed_everything": "3",
    "ckpt_path": "last",
    "run.dir": "out",
    "run.experiment": "name",
    "data.tasks": "maml_pipeline.tasks.Lines",
    "ways": "3",
    "shots": "4",
    "query_shots": "4",
    "meta_batch_size": "4",
    "num_workers": "1",
    "lr": "0.01",
    "inner_lr": "0.02",
    "inner_steps": "2",
    "eval_inner_steps": "4",
    "max_steps": "7",
    "steps": "7",
    "devices": "1",
    "num_nodes": "1",
    "val_check_interval": "5",
}
"""A valid value for each key that has aliases."""


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_two_screens_and_starts_with_usage_and_a_description(
    command: str,
    width: int,
    maml: Maml,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as done:
        maml(command, "--help")
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: maml {command}")
    assert "[-h]" not in lines[0]
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= width


@pytest.fixture(scope="module")
def cli() -> ResolvedConfig:
    return ResolvedConfig(TOY)


def help_keys() -> Iterator[training_help.Key]:
    for keys in training_help.GROUPS.values():
        yield from keys


def test_help_shows_every_key_of_the_project(cli: ResolvedConfig) -> None:
    shown = {key.name for key in help_keys()}
    groups = ("run", "data", "model", "probes", "seed_everything", "ckpt_path", "config")
    keys = {
        key
        for key in parser_keys(cli.command_parser("fit"))
        if key.partition(".")[0] in groups and key not in groups[:4] and not key.endswith(".help")
    }
    # The seed is linked to seed_everything, and the rates are shown by their only argument.
    assert keys - shown <= {"data.seed", "model.learned_inner_lr"}
    trainer = {key for key in shown if key.startswith("trainer.")}
    assert {key for key in shown - keys - trainer if not key.startswith(OF_A_CLASS)} == set()


def test_help_shows_the_defaults_of_the_parser(cli: ResolvedConfig) -> None:
    defaults = cli.command_parser("fit").get_defaults()
    for key in help_keys():
        default = key.default.partition(":")[0]
        if key.name == "model.optimizer":
            assert "adam" in str(defaults[key.name]).lower() and default == "Adam"
        elif not key.name.startswith(OF_A_CLASS):
            value = defaults.get(key.name)
            assert yaml.safe_load(default or "null") == value, key.name


def test_help_shows_the_default_ways() -> None:
    omniglot = import_module("maml_pipeline.tasks").Omniglot
    (ways,) = (key for key in help_keys() if key.name == "data.tasks.ways")
    assert int(ways.default) == inspect.signature(omniglot).parameters["ways"].default


def test_help_all_lists_keys_of_lightning_and_no_list_of_all_modules(
    maml: Maml, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        maml("fit", "--help", "all")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "--trainer.barebones" in text and "--model.inner_lr" in text
    assert "torch.nn.Bilinear" not in text and "maml_pipeline.tasks.Omniglot" in text


def test_the_examples_of_the_help_work(maml: Maml) -> None:
    short = ["--trainer.max_steps", "2", "--data.val_tasks", "2", "--data.test_tasks", "2"]
    for examples in training_help.EXAMPLES.values():
        for example in examples:
            arguments = example.split()[1:]
            maml(*arguments, *(short if "--config toy" in example else []))


def test_a_run_without_arguments_prints_the_help(
    maml: Maml, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["maml"])
    given: list[list[str] | None] = [[], None]
    for arguments in given:
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.startswith("usage: maml COMMAND ...")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "tradeoff"])
def test_a_command_without_a_config_asks_for_one(command: str, maml_error: Maml) -> None:
    error = maml_error(command)
    assert error.endswith("no config is given; add one, such as --config toy")


def test_a_config_without_a_required_key_names_it(maml_error: Maml, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "toy.yaml").read_text())
    del config["model"]["loss"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    assert "error: no value for model.loss; set it in a config or" in maml_error("fit", "--config", file)


def test_a_switch_without_a_value_gets_its_values(maml_error: Maml) -> None:
    error = maml_error("fit", *TOY, "--model.first_order")
    assert error.endswith("--model.first_order: expected one argument: true or false")
    error = maml_error("fit", *TOY, "--model.inner_lr")
    assert error.endswith("--model.inner_lr: expected one argument")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_help_of_an_evaluation_says_what_it_evaluates_without_ckpt_path(
    command: str, maml: Maml, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        maml(command, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "[null: best if --config is a run's, else none]" in shown


# Suggestions --------------------------------------------------------------------------------------


def suggested(error: str) -> list[str]:
    found = re.search(r"; did you mean (.*)\?$", error)
    assert found, error
    return found[1].split(" or ")


def flags_for(flag: str, keys: list[str], config: tuple[str, ...] = TOY) -> list[str]:
    """Return the words of all suggestions for a flag."""
    suggestions = suggested(suggest(f"unrecognized arguments: {flag}", keys, config))
    return [word for suggestion in suggestions for word in shlex.split(suggestion)]


def test_every_suggestion_works_as_typed(cli: ResolvedConfig, maml_error: Maml) -> None:
    keys = parser_keys(cli.command_parser("fit"))
    typed: list[str] = []
    for name in sorted({*ALIASES.values(), *ALTERNATIVES} - {"ways", "ckpt_path"}):
        words = flags_for(f"--{name} {VALUES[name]}", keys)
        assert VALUES[name] in words
        typed += words
    for name in SETTINGS.keys() - {"resume", "first_order"}:
        typed += flags_for(f"--{name}", keys)
    ResolvedConfig([*TOY, *typed])
    for resume in (flags_for("--resume", keys), flags_for("--ckpt last", keys)):
        assert "ckpt_path is last, but there is no" in maml_error("fit", *TOY, *resume)


def test_the_suggestion_for_ways_also_sets_the_ways_of_the_network(
    cli: ResolvedConfig, synthetic_omniglot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAML_OMNIGLOT_ROOT", str(synthetic_omniglot))
    words = flags_for("--n_way 3", parser_keys(cli.command_parser("fit")), OMNIGLOT)
    values = ResolvedConfig([*OMNIGLOT, *words]).values
    assert values["data"]["tasks"]["init_args"]["ways"] == 3
    assert values["model"]["network"]["init_args"]["ways"] == 3


def test_an_alias_gets_the_suggestion_for_its_key(cli: ResolvedConfig) -> None:
    keys = parser_keys(cli.command_parser("fit"))
    for alias, name in ALIASES.items():
        texts = [
            suggest(f"unrecognized arguments: --{flag} 1", keys, OMNIGLOT) for flag in (alias, name)
        ]
        assert texts[0] == texts[1] and name in texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shots", "5"), "did you mean --config FILE --data.tasks.shots 5?"),
        ((*TOY, "--data.shots=5"), "did you mean --data.tasks.shots 5?"),
        ((*TOY, "--max-steps", "5"), "did you mean --trainer.max_steps 5?"),
        ((*TOY, "--shots", "5", "--lr", "1"), "--data.tasks.shots 5, --model.optimizer.lr 1?"),
        ((*TOY, "--model.inner_rate", "1"), "did you mean --model.inner_lr 1"),
        ((*TOY, "--data.tasks.shot", "5"), "did you mean shots?"),
        ((*TOY, "--ways", "5"), "Lines takes shots, query_shots"),
        ((*TOY, "--order", "first"), "did you mean --model.first_order true?"),
        (("configs/toy.yaml",), "did you mean --config configs/toy.yaml?"),
        (("toy",), "did you mean --config toy?"),
        (("toy.yml", "--shots", "5"), "mean --config toy.yml, --config FILE --data.tasks.shots 5?"),
        ((*TOY, "--model.optimizer", "Adan"), "did you mean torch.optim.Adam or "),
        ((*TOY, "--model.optimizer", "torch.optim.Adan"), "did you mean torch.optim.Adam or "),
        ((*TOY, "--model.lr_scheduler", "Cosine"), "mean torch.optim.lr_scheduler.CosineAnnealingLR or"),
        ((*TOY, "--data.tasks", "Sine"), "did you mean maml_pipeline.tasks.SineWaves?"),
        ((*TOY, "--data.tasks", "maml_pipeline.tasks.Sine"), "mean maml_pipeline.tasks.SineWaves?"),
        ((*TOY, "--model.network", "Conv"), "did you mean maml_pipeline.networks.ConvNet?"),
        ((*TOY, "--model.network", "torch.nn.Linaer"), "did you mean torch.nn.Linear or "),
        ((*TOY, "--model.network", "absent.Net"), "put the folder of absent on PYTHONPATH"),
    ],
)
def test_a_suggestion_depends_on_the_classes_in_use(
    arguments: tuple[str, ...], message: str, maml_error: Maml
) -> None:
    assert message in maml_error("fit", *arguments)


def test_a_bare_folder_of_a_run_is_suggested_by_its_config(maml_error: Maml, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "did you mean --config run/config.yaml?" in maml_error("test", "run")


def test_the_learning_rate_of_the_default_optimizer_needs_its_class(
    maml_error: Maml, tmp_path: Path
) -> None:
    config = yaml.safe_load((CONFIGS / "toy.yaml").read_text())
    del config["model"]["optimizer"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    (suggestion,) = suggested(maml_error("fit", "--config", file, "--lr", "0.1"))
    values = ResolvedConfig(["--config", str(file), *shlex.split(suggestion)]).values
    assert values["model"]["optimizer"]["init_args"]["lr"] == 0.1


def test_help_imports_neither_pytorch_nor_lightning() -> None:
    script = """
import contextlib, io, sys
from maml_pipeline.cli import COMMANDS, main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([command, "--help"])
    print(command, *sorted({"torch", "pytorch_lightning", "wandb"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [*COMMANDS]


def test_the_help_of_a_tradeoff_names_every_order(
    maml: Maml, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        maml("tradeoff", "--help")
    printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # names wrap at hyphens
    assert all(name in printed for name in ORDER_NAMES)
