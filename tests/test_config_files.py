"""Configuration files: duplicate keys are rejected, merge keys work."""

from pathlib import Path

import pytest

from maml_pipeline.cli.config_files import check_config_files, read_config
from maml_pipeline.errors import UserError

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


def test_keys_of_merged_mappings_may_be_overridden(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(MERGED)
    assert read_config(config, "config")["most"] == {"lr": 3, "steps": 4}
