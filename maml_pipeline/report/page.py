"""Write the report: one HTML page that needs no network, the same in Markdown, and the plots as PNG."""

import base64
import html
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from errno import EISDIR
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from maml_pipeline.errors import UserError
from maml_pipeline.files import make_folder, write_atomically
from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.findings import choice_notes, findings
from maml_pipeline.report.plots import Plot, draw_plots
from maml_pipeline.report.style import order_style, plot_style
from maml_pipeline.report.table import Column, table_columns, table_notes
from maml_pipeline.report.tradeoff_plot import draw_overview
from maml_pipeline.run_folder import CONFIG
from maml_pipeline.runs.run import Run
from maml_pipeline.text import printable

LONGEST_SLUG = 80
"""Characters; a file name has at most 255 bytes, and a plot's name follows."""

MOST_PIXELS = 60_000
"""Matplotlib writes no PNG with 2**16 or more pixels per side."""


@dataclass(frozen=True)
class Section:
    """One experiment of the page.

    Args:
        title: The experiment, and the settings that distinguish it from others of the same name.
        slug: The title as part of a file name, unique on the page.
        rows: Its rows.
        columns: The columns of its table.
        findings: Its results in sentences.
        plots: Its plots.
    """

    title: str
    slug: str
    rows: list[ComparisonRow]
    columns: list[Column]
    findings: list[str]
    plots: list[Plot]

    def picture(self, plot: Plot) -> str:
        """Return the name of a plot on the page; no slug and no plot has two dashes in a row."""
        return f"{self.slug}--{plot.name}"

    @property
    def column_groups(self) -> list[tuple[str, list[Column]]]:
        """The columns by the heading that they share."""
        groups: dict[str, list[Column]] = {}
        for column in self.columns:
            groups.setdefault(column.group, []).append(column)
        return [*groups.items()]

    @property
    def notes(self) -> list[str]:
        """What must be known to read the table."""
        return [*table_notes(self.rows), *choice_notes(self.rows)]


def write_report(
    experiments: dict[str, list[ComparisonRow]], folder: Path, left_out: Sequence[str] = ()
) -> Path:
    """Write `report.html`, `report.md` and the plots as PNG: all of them, or none.

    Args:
        experiments: The comparison, as returned by `compare`.
        folder: The output folder, which is created. Files of an earlier report are replaced.
        left_out: What is not reported, one line each.

    Returns:
        The path of `report.html`, which contains its plots.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    files = _render(experiments, folder, left_out)
    is_new = not folder.exists()
    make_folder(folder, "out")
    try:
        _write(files, folder)
    except OSError as error:
        if is_new:
            folder.rmdir()
        raise UserError(
            f"out {folder} cannot be written to ({error.strerror}); choose another folder"
        ) from error
    return folder / "report.html"


def _render(
    experiments: dict[str, list[ComparisonRow]], folder: Path, left_out: Sequence[str]
) -> dict[str, bytes]:
    """Return the report's files by name, `report.html` last."""
    runs = [run for rows in experiments.values() for row in rows for run in row.runs]
    slugs = _slugs(experiments)
    sections = [
        Section(
            title,
            slugs[title],
            rows,
            table_columns(rows),
            findings(rows),
            draw_plots(rows),
        )
        for title, rows in experiments.items()
    ]
    files = {"overview.png": render_figure(draw_overview(experiments), "png")}
    for section in sections:
        for plot in section.plots:
            files[f"{section.picture(plot)}.png"] = render_figure(plot.figure, "png")

    environment = Environment(
        loader=PackageLoader("maml_pipeline.report", "."),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "md": escape_markdown}
    values = {
        "sections": sections,
        "styles": {run.order: order_style(run.order) for run in runs},
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config_link": lambda run: _config_link(run, folder),
        "finished": sum(run.is_finished for run in runs),
        "runs": runs,
        "left_out": left_out,
    }
    for file in ("report.md", "report.html"):
        files[file] = environment.get_template(f"{file}.jinja").render(values).encode()
    return files


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Write all files to a temporary folder, then move them: a full disk leaves the earlier report."""
    for name in files:
        if (folder / name).is_dir():
            raise IsADirectoryError(EISDIR, f"{name} is a folder")
    with TemporaryDirectory(prefix=".report-", dir=folder) as unfinished:
        for name, content in files.items():
            write_atomically(Path(unfinished) / name, content)
        for name in files:
            (Path(unfinished) / name).replace(folder / name)


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Return a short, plain and unique part of a file name for each name."""
    slugs: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
        slug = plain[:LONGEST_SLUG]
        # Some file systems ignore case.
        if slug != plain or not slug or slug.lower() in taken:
            slug = f"{slug}-{sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
        taken.add(slug.lower())
        slugs[name] = slug
    return slugs


def escape_markdown(text: object) -> str:
    """Escape text so that Markdown shows it literally: no markup, no HTML, no end of a table cell."""
    escaped = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~$]|:(?=//|\w+:))", r"\\\1", escaped)


def render_figure(figure: Figure, kind: str) -> bytes:
    """Return a figure as `svg` or `png`, the same bytes each time."""
    buffer = BytesIO()
    with plot_style():
        figure.savefig(
            buffer,
            format=kind,
            metadata={"Date": None} if kind == "svg" else None,
            dpi=min(mpl.rcParams["savefig.dpi"], MOST_PIXELS / max(figure.get_size_inches())),
        )
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return a figure as a data URI, which keeps the image inside the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(render_figure(figure, "svg")).decode()


def _config_link(run: Run, folder: Path) -> str | None:
    """Return the relative link from the report to a run's config; `None` if there is no such file.

    It begins with `./` or `../`, so that a folder named `javascript:...` is not read as a script link.
    """
    config = run.source / CONFIG
    if not config.is_file():
        return None
    path = os.path.relpath(config, folder)
    return quote(os.fsencode(path if path.startswith("..") else f"./{path}"))
