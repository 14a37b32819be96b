"""Configuration files: shipped ones have names, duplicate keys are rejected, merge keys work."""

from pathlib import Path

import pytest

from maml_pipeline.cli.config_files import check_config_files, find_shipped
from maml_pipeline.config_file import read_config
from maml_pipeline.errors import UserError
from maml_pipeline.shipped_files import shipped_configs
from tests.helpers import Maml

MERGED = """\
base: &base {lr: 1, steps: 2}
more: &more
  <<: *base
  lr: 3
most:
  <<: *more
  steps: 4
"""


def test_a_duplicate_key_is_rejected_with_its_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  inner_lr: 1\n  inner_lr: 2\n")
    for arguments in (["--config", str(config)], [f"--config={config}"], ["-c", str(config)]):
        with pytest.raises(UserError, match=r"line 3: duplicate key inner_lr"):
            check_config_files(["--run.mode", "min", *arguments])


def test_a_seed_of_the_data_is_refused_where_seed_everything_differs(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    for text in ("data: {seed: 5}\n", "seed_everything: 1\ndata: {seed: 5}\n"):
        config.write_text(text)
        with pytest.raises(UserError, match=r"data.seed is 5 in .*; it is set by seed_everything"):
            check_config_files(["--config", str(config)])
    for text in ("seed_everything: 5\ndata: {seed: 5}\n", "data: null\n"):
        config.write_text(text)
        check_config_files(["--config", str(config)])


def test_keys_of_merged_mappings_may_be_overridden(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(MERGED)
    assert read_config(config, "config")["most"] == {"lr": 3, "steps": 4}


def test_a_name_of_a_shipped_config_is_its_file_and_other_arguments_stay() -> None:
    toy, deep = (str(shipped_configs()[name]) for name in ("toy", "omniglot/5way_1shot"))
    given = ["--config", "toy", "--config=omniglot/5way_1shot", "--run.dir", "toy", "-c", "a.yaml"]
    expected = ["--config", toy, f"--config={deep}", "--run.dir", "toy", "-c", "a.yaml"]
    assert find_shipped(given) == expected
    assert find_shipped(expected) == expected


def test_a_file_has_precedence_over_a_shipped_config_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sine").mkdir()
    (tmp_path / "toy").write_text("model: {inner_lr: 1}\n")
    assert find_shipped(["--config", "toy"]) == ["--config", "toy"]
    assert find_shipped(["--config", "sine"]) == ["--config", str(shipped_configs()["sine"])]


def test_a_misspelled_name_is_corrected() -> None:
    with pytest.raises(UserError, match=r"config tyo is neither .*; did you mean toy\?"):
        find_shipped(["--config", "tyo"])
    with pytest.raises(UserError, match=r"`maml configs` lists those of the package"):
        find_shipped(["--config", "imagenet-21k"])


def test_configs_lists_every_config_with_its_first_sentence(
    maml: Maml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = maml("configs").splitlines()
    assert [line.split()[0] for line in lines] == [*shipped_configs(), "sweep"]
    described = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert described["toy"] == "Toy task: one linear unit learns lines."
    assert all(described.values())


def test_configs_prints_a_config_that_can_be_edited(maml: Maml, maml_error: Maml) -> None:
    assert maml("configs", "sine") == shipped_configs()["sine"].read_text()
    assert "there is no config nosuch; the configs are cifar_fs/5way_1shot, cpu, " in maml_error(
        "configs", "nosuch"
    )
