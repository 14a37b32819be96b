"""Names and paths that look like markup, scripts or control characters are shown literally."""

import html
import os
import re
import shutil
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from rich.console import Console

from maml_pipeline.cli import main
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.page import escape_markdown
from maml_pipeline.text import printable
from maml_pipeline.tradeoff.grid import Cell
from maml_pipeline.tradeoff.progress_bar import GridProgress
from tests.run_copies import config, copy_run, each, remove, write

pytestmark = pytest.mark.integration

NAMES = [
    "cost $a_{b$",
    "$\\frac{$ ^_{ \\",
    "x[/b]",
    "[bold red]x[/] :smile:",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b `c` *d* _e_ [f](javascript:alert(1)) ![g](h) # i ~~j~~",
    "\x1b[31mred\x1b]0;title\x07 \x9b31m \r\b",
    "line\nline\u2028line",
    "\u202eright to left",
    "\ud800 no unicode",
    "任务 🧪 ñ",
    "x" * 400,
    "word " * 80,
    "../../esc",
    "/etc/passwd",
    "{{ 7 * 7 }} {% raw %}",
    "%s %d %(a)s",
    " ",
    "",
]


@pytest.fixture(scope="module")
def named_runs(trained_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return runs with one row of metrics, whose experiments have the names in `NAMES`."""
    metrics = write("metrics.csv", "step,val/loss,memory/meta_step_peak_bytes\n9,1.0,272\n")
    short = each(metrics, *map(remove, ("test.json", "wandb")))
    folders = []
    for number, name in enumerate(NAMES):
        folder = tmp_path_factory.mktemp("named") / f"run{number}"
        named = each(short, config("run.experiment", name))
        folders.append(copy_run(trained_runs / "lines" / "first-k1-s0", folder, named))
    return folders


class Tags(HTMLParser):
    """Collect the tags and attributes of a page as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def test_names_are_shown_literally(
    named_runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", *map(str, named_runs)])
    out, folder = capsys.readouterr().out, tmp_path / "report"
    assert all(line.isprintable() for line in out.split("\n"))
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    headings = [html.unescape(heading) for heading in re.findall("<h2>(.*?)</h2>", page)]
    assert sorted(headings) == sorted(map(printable, NAMES))
    tags = Tags(page)
    assert "script" not in tags.names and not {name for name in tags.attributes if name[:2] == "on"}
    assert tags.names.count("img") == len([*folder.glob("*.png")]) - 1  # the overview is not in the page
    assert not re.search("<[a-zA-Z/!]", markdown)
    links = re.findall(r"(?<!\\)\]\(([^)]*)\)", markdown)
    assert all(link.endswith((".png", "/config.yaml")) and ":" not in link for link in links)
    assert all(f"## {escape_markdown(name)}".strip() in markdown for name in NAMES)
    # Nothing is written elsewhere, and every linked plot exists.
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    linked = set(re.findall(r"\]\(([^)]+\.png)\)", markdown))
    assert linked == {path.name for path in folder.glob("*.png")} and len(linked) == 1 + 3 * len(NAMES)
    assert {path.name for path in folder.iterdir()} == linked | {"report.html", "report.md"}


def test_progress_shows_names_literally(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=StringIO(), force_terminal=True, width=200)
    cell = Cell(GradientOrder(first_order=True), 1, 0)
    progress = GridProgress([cell], 10, console)
    with progress.bars:
        progress.start(cell, 0)
        progress.update(cell, 3)
        progress.end(cell, "network [/b] :smile: \x1b]0;title\x07 failed")
    assert isinstance(console.file, StringIO)
    assert r"failed: network [/b] :smile: \x1b]0;title\x07 failed" in console.file.getvalue()


@pytest.mark.parametrize(
    "name", ["javascript:alert(1)", "data:text,x", "a b#c?d%41", '"onclick="x', "ü\udcff", "x)[y](z"]
)
def test_links_lead_to_the_config_for_any_folder_name(
    name: str, trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_runs / "other" / "alone", name, ignore=shutil.ignore_patterns("wandb"))
    for out in (".", "report"):
        main(["report", name, "--out", out])
        for file, pattern in (
            ("report.html", r'<a href="([^"]*)"'),
            ("report.md", r"config\.yaml\]\(([^)]*)\)"),
        ):
            (link,) = re.findall(pattern, Path(out, file).read_text())
            assert link.startswith(("./", "../")) and ":" not in link
            assert os.path.isfile(os.path.join(os.fsencode(out), unquote_to_bytes(link)))
