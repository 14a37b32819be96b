"""`maml report` writes a self-contained page that fits any screen."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from maml_pipeline.errors import UserError
from maml_pipeline.report.comparison import compare
from maml_pipeline.report.page import escape_markdown, write_report
from maml_pipeline.report.plots import draw_plots
from maml_pipeline.report.table import table_columns
from maml_pipeline.runs.find import find_runs
from tests.helpers import Maml
from tests.run_copies import copy_run, each, remove, write

pytestmark = pytest.mark.integration

PLOTS = [
    *("tradeoff", "tradeoff-time", "memory", "time"),
    *(
        f"{name}-k{k}"
        for k in (1, 2)
        for name in ("training-loss", "validation", "order-gap", "adaptation")
    ),
]


@pytest.fixture(scope="module")
def report(trained_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(compare(find_runs([trained_runs]).runs), folder)


def test_the_command_reports_all_runs_below_the_given_folders(
    maml: Maml, trained_runs: Path, tmp_path: Path
) -> None:
    printed = maml("report", trained_runs / "lines", trained_runs / "other", "--out", "mine")
    assert "Report: mine/report.html" in printed
    page = (tmp_path / "mine" / "report.html").read_text()
    markdown = (tmp_path / "mine" / "report.md").read_text()
    assert "13 of 13 runs finished" in page and "Left out" not in page + markdown
    for rows in compare(find_runs([trained_runs]).runs).values():
        for column in table_columns(rows):
            assert all(cell in page and cell in markdown for cell in column.cells)
        for row in rows:
            for run in row.runs:
                assert f"  {run.source}\n" in printed and f">{run.source}</td>" in page
                assert f"| {escape_markdown(run.source)} |" in markdown


def test_every_plot_is_in_the_page_in_markdown_and_a_file(report: Path) -> None:
    page, markdown = report.read_text(), (report.parent / "report.md").read_text()
    for name in [f"toy--{plot}" for plot in PLOTS] + ["other--tradeoff"]:
        assert f'<figure id="{name}">' in page
        assert f"]({name}.png)" in markdown
        with Image.open(report.parent / f"{name}.png") as png:
            assert png.width >= 800
    linked = set(re.findall(r"\]\(([^)]+\.png)\)", markdown))
    assert linked == {path.name for path in report.parent.glob("*.png")}


def test_the_page_needs_no_network(report: Path) -> None:
    page = report.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert sources and all(source.startswith(("data:", "../")) for source in sources)
    assert "<script" not in page


def test_links_lead_to_the_configs(report: Path) -> None:
    for file in ("report.html", "report.md"):
        text = (report.parent / file).read_text()
        links = set(re.findall(r'["(]([^"(]+config\.yaml)[")]', text))
        assert len(links) == 13
        assert all((report.parent / link).is_file() for link in links)


def test_the_same_runs_give_the_same_plots(trained_runs: Path, tmp_path: Path) -> None:
    runs = find_runs([trained_runs / "other"]).runs
    for name in ("one", "two"):
        write_report(compare(runs), tmp_path / name)
    for plot in (tmp_path / "one").glob("*.png"):
        assert plot.read_bytes() == (tmp_path / "two" / plot.name).read_bytes()


def test_a_run_without_probes_and_before_its_first_validation_is_reported(
    maml: Maml, trained_runs: Path, tmp_path: Path
) -> None:
    started = each(
        write("metrics.csv", "step,train/loss\n0,1.5\n"), *map(remove, ("test.json", "wandb"))
    )
    folder = copy_run(trained_runs / "other" / "alone", tmp_path / "started", started)
    printed = maml("report", folder)
    assert "other" in printed
    assert "0 of 1 runs finished" in (tmp_path / "report" / "report.html").read_text()
    ((rows),) = compare(find_runs([folder]).runs).values()
    assert [plot.name for plot in draw_plots(rows)] == ["training-loss-k1"]


# All or nothing ---------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_one_line(
    maml_error: Callable[..., str], trained_runs: Path, tmp_path: Path
) -> None:
    run = trained_runs / "other"
    assert "out /dev/null/report cannot be created" in maml_error(
        "report", run, "--out", "/dev/null/report"
    )
    assert "--out: it is empty" in maml_error("report", run, "--out", "")
    (tmp_path / "there" / "report.html").mkdir(parents=True)
    assert "report.html is a folder" in maml_error("report", run, "--out", "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "report.html"]


def test_a_full_disk_leaves_the_earlier_report(
    trained_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(compare(find_runs([trained_runs / "other"]).runs), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written: list[Path] = []

    def full_after_three(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr("maml_pipeline.report.page.write_atomically", full_after_three)
    runs = find_runs([trained_runs / "lines" / "first-k1-s0"]).runs
    with pytest.raises(UserError, match="cannot be written to \\(No space left on device\\)"):
        write_report(compare(runs), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError):
        write_report(compare(runs), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# In a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium: install Debian's package chromium")
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, which continuous integration often uses.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 1000, 400])
def test_a_browser_shows_the_whole_page(chromium: Browser, report: Path, width: int) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 800})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(report.as_uri())
    assert complaints == []

    images = page.locator("figure img")
    assert images.count() == len(PLOTS) + 8  # the other experiment has one number of inner steps
    for image in images.all():
        assert image.evaluate("i => i.complete && i.naturalWidth > 0")
        box = image.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["width"] >= 360  # smaller plots would be hard to read
    if width >= 1000:  # the results fit
        for results in page.locator(".scroll[aria-label$=', results']").all():
            assert results.evaluate("box => box.scrollWidth <= box.clientWidth")
    # Wide tables scroll, but the page does not, and no text is small.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    smallest = "Math.min(...[...document.querySelectorAll('p, td, th, li, figcaption')].map("
    assert page.evaluate(smallest + "e => parseFloat(getComputedStyle(e).fontSize)))") >= 14
    assert page.locator("details a").first.is_visible()
    page.locator("details summary").first.click()
    assert not page.locator("details a").first.is_visible()
    page.close()
