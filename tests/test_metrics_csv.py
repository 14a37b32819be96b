"""metrics.csv contains every row once, even after a truncated write."""

import os
from pathlib import Path
from typing import Any

import pytest

from maml_pipeline.errors import UserError
from maml_pipeline.learner.metrics_csv import MetricsCSV
from maml_pipeline.metrics_table import read_last_row, read_metrics

ROWS: list[dict[str, float]] = [
    {"step": 0, "train/loss": 0.1},
    {"step": 9, "memory/peak_bytes": 3960, "speed/ms": 1e-05},
    {"step": 9, "train/loss": float("inf")},
    {"step": 10, "train/loss": 18.0037, "speed/ms": 2.5},
]


def write(folder: Path, rows: list[dict[str, float]]) -> Path:
    logger = MetricsCSV(folder / "metrics.csv")
    for row in rows:
        logger.log_metrics(
            {name: value for name, value in row.items() if name != "step"}, int(row["step"])
        )
    logger.finalize("success")
    return folder / "metrics.csv"


def test_logged_values_are_read_back_with_their_types(tmp_path: Path) -> None:
    table = write(tmp_path, ROWS)
    assert read_metrics(table) == ROWS
    assert [type(value) for value in read_metrics(table)[1].values()] == [int, float, int]
    assert read_last_row(table) == ROWS[-1]


def test_a_table_continued_by_another_process_is_identical(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", ROWS).read_bytes()
    for stop in range(len(ROWS) + 1):
        folder = tmp_path / str(stop)
        write(folder, ROWS[:stop])
        assert write(folder, ROWS[stop:]).read_bytes() == whole


def test_a_table_cut_at_any_byte_keeps_the_rows_before_and_is_continued(tmp_path: Path) -> None:
    # No new column after the first row: only an appended row can be cut.
    rows = [{"step": step, "a": step / 7, "b": step / 3} for step in range(4)]
    whole = write(tmp_path / "whole", rows).read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    table = folder / "metrics.csv"
    for size in range(len(whole)):
        table.write_bytes(whole[:size])
        kept = max(0, whole[:size].count(b"\n") - 1)
        assert read_metrics(table) == rows[:kept]
        assert read_last_row(table) == (rows[kept - 1] if kept else None)
        logger = MetricsCSV(folder / "metrics.csv")
        logger.experiment.drop_from(2)  # the checkpoint that is resumed from
        if kept < 2:  # rows before a checkpoint were written before it
            continue
        for row in rows[2:]:
            logger.log_metrics({"a": row["a"], "b": row["b"]}, int(row["step"]))
        assert table.read_bytes() == whole


@pytest.mark.parametrize(
    "damaged", ["1,18.0037", "1,0.5,0.5,0.5", "one,0.5,0.5", "1,0.5,O.5", "\0" * 20]
)
def test_a_damaged_last_row_is_left_out_and_an_earlier_one_rejected(
    tmp_path: Path, damaged: str
) -> None:
    table = tmp_path / "metrics.csv"
    table.write_text(f"step,a,b\n0,0.5,\n{damaged}\n")
    assert read_metrics(table) == [{"step": 0, "a": 0.5}]
    assert read_last_row(table) == {"step": 0, "a": 0.5}
    table.write_text(f"step,a,b\n0,0.5,\n{damaged}\n2,0.5,0.5\n")
    with pytest.raises(UserError, match=r"metrics\.csv is damaged in line 3"):
        read_metrics(table)


def test_a_missing_table_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.csv") == []
    assert read_last_row(tmp_path / "metrics.csv") is None


def test_the_last_row_of_a_long_table_is_read_from_its_end(tmp_path: Path) -> None:
    table = tmp_path / "metrics.csv"
    rows = "".join(f"{step},{step / 7}\n" for step in range(5000))
    table.write_text("step,a\n" + rows)
    assert read_last_row(table) == {"step": 4999, "a": 4999 / 7}


def test_a_full_disk_leaves_the_table_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(tmp_path, [{"step": 0, "a": 0.5}])
    before = table.read_bytes()

    class FullDisk:
        """Accepts three bytes."""

        def __init__(self, file: Any) -> None:
            self.file = file
            self.room = 3

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room = 0
            return int(self.file.write(content[:3]))

        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    logger = MetricsCSV(tmp_path / "metrics.csv")
    assert logger.experiment.metrics_keys == ["a", "step"]
    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "open", lambda path, *args, **kwargs: FullDisk(original(path, *args, **kwargs))
        )
        with pytest.raises(OSError, match="No space left") as full:
            logger.log_metrics({"a": 0.25}, 1)
    assert full.value.filename == os.fspath(table)
    logger.finalize("failed")
    assert table.read_bytes() == before
