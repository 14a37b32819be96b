"""Start and end of the `maml` command: what it imports when, and that a quick end loses nothing."""

import gc
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from maml_pipeline.cli import known_keys, main
from maml_pipeline.cli.checked_command import CheckedCommand
from maml_pipeline.cli.jsonargparse_internals import parser_keys
from maml_pipeline.cli.known_keys import check_keys
from maml_pipeline.errors import UserError
from maml_pipeline.garbage import collector_paused
from maml_pipeline.learner.tracking import find_wandb_logs, read_wandb_log
from maml_pipeline.metrics_table import read_metrics
from maml_pipeline.shipped_files import shipped_configs
from tests.helpers import SHORT, SHORT_NAME, Maml, maml_process, process_environment, run_python

FRAMEWORKS = {"pytorch_lightning", "torchmetrics", "wandb", "matplotlib", "torchvision"}

WRONG_KEYS = {
    "a flag": ["--model.iner_lr", "0.1"],
    "a flag with its value": ["--model.iner_lr=0.1"],
    "a group": ["--modle.inner_lr", "0.1"],
    "an argument of the tasks": ["--shots", "5"],
    "nothing alike": ["--xyzzy"],
    "several": ["--trainer.max_step=4", "--seed_everything", "3", "x.yaml", "--model.innr_lr", "-3"],
    "a dash": ["--max-steps", "3"],
    "a key in a file": ["--config", "key.yaml"],
    "a group in a file": ["--config", "group.yaml"],
    "a key outside groups in a file": ["--config", "single.yaml"],
    "a flag and a key in a file": ["--config", "key.yaml", "--mod.x", "1"],
}
FILES = {
    "key.yaml": "model: {iner_lr: 0.1}",
    "group.yaml": "modle: {inner_lr: 0.1}",
    "single.yaml": "seed: 3",
}

LEFT_TO_THE_PARSER = {
    "no key": [],
    "a key of a class": ["--model.network.hidden_features", "[8]", "--model.optimizer.lr=1e-2"],
    "a list": ["--trainer.callbacks+", "LearningRateMonitor", "--trainer.callbacks.log_momentum=true"],
    "a negative value": ["--trainer.max_steps", "-1"],
    "JSON": ["--trainer", '{"max_steps": 3}', "--config", '{"model": {"inner_lr": 0.1}}'],
}


@pytest.fixture
def _wrong_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


# Keys ---------------------------------------------------------------------------------------------


class ParserOnly(CheckedCommand):
    """Builds the parser of a command, which has the keys that classes of Lightning take."""

    def parse_arguments(self, parser: object, args: object) -> None:
        self.keys = {*parser_keys(parser)}  # type: ignore[arg-type]
        raise KeyError  # nothing is to be built


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_the_keys_in_the_source_code_are_those_of_the_parser(command: str) -> None:
    parser = ParserOnly.__new__(ParserOnly)
    with pytest.raises(KeyError):
        parser.__init__(command, [])  # type: ignore[misc]
    others = {"print_config", "subcommand"}
    keys = {key for key in parser.keys - others if not key.endswith("help")}
    assert keys == {*known_keys.known_keys()}


@pytest.mark.usefixtures("_wrong_files")
@pytest.mark.parametrize("arguments", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_key_has_the_message_that_the_parser_would_give(arguments: list[str]) -> None:
    toy = ["--config", "toy", *arguments]
    with pytest.raises(UserError) as early:
        check_keys(toy)
    with pytest.raises(UserError) as late:
        CheckedCommand("fit", toy)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("arguments", LEFT_TO_THE_PARSER.values(), ids=LEFT_TO_THE_PARSER)
def test_what_lies_below_the_known_keys_is_left_to_the_parser(arguments: list[str]) -> None:
    check_keys(["--config", "toy", *arguments])


@pytest.mark.parametrize("config", shipped_configs())
def test_every_shipped_config_has_known_keys(config: str) -> None:
    check_keys(["--config", config])


# Imports ------------------------------------------------------------------------------------------


def imported_by(*arguments: str) -> set[str]:
    """Return the packages that a command imports in a process of its own."""
    script = f"""
        import json, sys
        from maml_pipeline.cli import main
        try:
            main({[*map(str, arguments)]!r})
        except SystemExit:
            pass
        print(json.dumps([*sys.modules]))
    """
    done = run_python(script)
    done.check_returncode()
    return {module.partition(".")[0] for module in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.integration
def test_derive_needs_neither_lightning_nor_wandb() -> None:
    assert not imported_by("derive") & FRAMEWORKS


@pytest.mark.integration
def test_a_wrong_key_is_refused_before_any_framework_is_imported() -> None:
    assert not imported_by("fit", "--config", "toy", "--model.iner_lr", "0.1") & FRAMEWORKS
    assert not imported_by("fit", "--config", "no-such-config") & (FRAMEWORKS | {"torch"})


@pytest.mark.integration
def test_a_wrong_value_is_refused_before_any_framework_is_imported() -> None:
    wrong = imported_by("fit", "--config", "toy", "--model.inner_lr", "fast")
    assert not wrong & (FRAMEWORKS | {"torch"})


@pytest.mark.integration
def test_scipy_signal_is_spared_and_can_be_imported_afterwards() -> None:
    script = """
        import sys
        from maml_pipeline.cli.late_imports import import_command
        import_command("fit", ["--config", "toy"])
        assert "torchmetrics" in sys.modules and "scipy.signal" not in sys.modules
        import scipy
        from scipy.signal import butter
        assert scipy.signal.butter is butter and len(butter(2, 0.5)) == 2
        assert scipy.signal.windows.hamming(3)[1] == 1
    """
    run_python(script).check_returncode()


@pytest.mark.integration
@pytest.mark.parametrize(
    "statement", ["from scipy.signal import butter", "import scipy.signal.windows as s; s.hamming(3)"]
)
def test_scipy_signal_is_there_if_something_needs_it_meanwhile(statement: str) -> None:
    script = f"""
        import sys
        from maml_pipeline.cli.late_imports import without_scipy_signal
        with without_scipy_signal():
            import scipy.signal
            assert hasattr(scipy.signal, "hamming")
            assert "scipy.signal.windows" not in sys.modules
            {statement}
        assert sys.modules["scipy.signal"].butter
    """
    run_python(script).check_returncode()


# The collector ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_as_before_after_a_command(
    is_enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (gc.enable if is_enabled else gc.disable)()
    try:
        for arguments in (["derive"], ["fit", "--config", "toy", "--no_such_key", "1"]):
            with suppress(SystemExit):
                main(arguments)
            assert gc.isenabled() == is_enabled
            assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_the_collector_is_paused_and_then_exempts_what_exists() -> None:
    try:
        with collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


# The end of the process ---------------------------------------------------------------------------

ENDING = """
    import atexit, sys, threading
    atexit.register(print, "handler")  # before ours, as coverage does
    from maml_pipeline import cli
    from maml_pipeline.cli import quick_exit

    class Late:
        def __del__(self):
            print("teardown")

    late = Late()

    def run():
        global file
        file = open("left_open.txt", "w")
        file.write("text")
        print("run", end=" ")
        {body}

    cli.run = run
    quick_exit.main()
"""
ENDS = {
    "returns": ("pass", 0, ""),
    "exits": ("sys.exit()", 0, ""),
    "exits with zero": ("sys.exit(0)", 0, ""),
    "exits with a status": ("sys.exit(143)", 143, ""),
    "exits with a message": ("sys.exit('maml: error: wrong')", 1, "maml: error: wrong\n"),
}


@pytest.mark.integration
@pytest.mark.parametrize(("body", "status", "message"), ENDS.values(), ids=ENDS)
def test_a_quick_end_runs_handlers_writes_files_and_keeps_the_status(
    body: str, status: int, message: str, tmp_path: Path
) -> None:
    done = run_python(ENDING.format(body=body), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, "run handler\n", message)
    assert (tmp_path / "left_open.txt").read_text() == "text"


@pytest.mark.integration
@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('a bug')",
        "threading.Timer(0.5, print, ['thread']).start()",
        "threading.Timer(0.5, print, ['thread']).start(); sys.exit(4)",
    ],
)
def test_the_interpreter_ends_what_is_not_finished(body: str, tmp_path: Path) -> None:
    done = run_python(ENDING.format(body=body), cwd=tmp_path)
    assert "teardown" in done.stdout and "handler" in done.stdout
    assert ("thread" in done.stdout) == ("Timer" in body)
    assert done.returncode == (1 if "raise" in body else 4 if "exit" in body else 0)
    assert ("a bug" in done.stderr) == ("raise" in body)


@pytest.mark.integration
def test_a_profiler_around_the_command_reports() -> None:
    command = [sys.executable, "-m", "cProfile", "-m", "maml_pipeline", "--version"]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "function calls" in done.stdout


@pytest.mark.integration
def test_a_run_in_a_process_leaves_what_one_in_this_process_leaves(
    maml: Maml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    here, there = tmp_path / "runs" / SHORT_NAME, tmp_path / "runs" / f"{SHORT_NAME}-2"
    maml("fit", *SHORT)
    done = maml_process("fit", *SHORT, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()

    def names(folder: Path) -> set[str]:
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if "wandb" not in p.parts}

    assert names(there) == names(here)
    assert (there / "test.json").read_text() == (here / "test.json").read_text()
    steps = [[row["step"] for row in read_metrics(folder / "metrics.csv")] for folder in (here, there)]
    assert steps[0] == steps[1]
    logged = []
    for folder in (here, there):
        ((log,),) = find_wandb_logs(folder).values()
        _, history = read_wandb_log(log)
        logged.append([sorted(row) for row in history])
    assert logged[0] == logged[1] and logged[0]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        ([], 2),
        (["derive"], 0),
        (["fit", "--config", "toy", "--model.iner_lr", "1"], 1),
        (["fit", "--config", "toy", "--model.inner_lr", "fast"], 1),
    ],
)
def test_exit_statuses_are_kept(arguments: list[str], status: int) -> None:
    assert maml_process(*arguments).returncode == status


if sys.platform == "linux":

    @pytest.mark.integration
    def test_a_full_disk_behind_standard_output_is_reported() -> None:
        with open("/dev/full", "w") as full:
            done = run_python(
                """
                import sys
                sys.argv = ["maml", "configs"]
                from maml_pipeline.cli.quick_exit import main
                main()
                """,
                stdout=full,
            )
        assert done.returncode == 1
        assert "standard output" in done.stderr
