"""One page of what runs have come to: as HTML that needs no network, as Markdown, and as PNG."""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from maml_pipeline.files import make_folder, write_atomically
from maml_pipeline.tools.comparison import Row, compare, findings, headers
from maml_pipeline.tools.report.pictures import Picture, draw_overview, draw_pictures
from maml_pipeline.tools.report.style import style
from maml_pipeline.tools.run import Run


@dataclass(frozen=True)
class Section:
    """One experiment of the page."""

    name: str
    rows: list[Row]
    headers: tuple[str, ...]
    findings: list[str]
    pictures: list[Picture]

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^\w.]+", "-", self.name)


def write_report(runs: Sequence[Run], folder: Path) -> Path:
    """Write `report.html`, `report.md` and the pictures as PNG.

    Args:
        runs: In the order of `load_runs`.
        folder: Where to; it is made. Files of an earlier report are replaced.

    Returns:
        The path of `report.html`, which holds its pictures itself.

    Raises:
        UserError: The folder cannot be made.
    """
    make_folder(folder, "out")
    experiments = compare(runs)
    sections = [
        Section(name, rows, headers(rows), findings(rows), draw_pictures(rows))
        for name, rows in experiments.items()
    ]
    overview = draw_overview(experiments)
    write_atomically(folder / "overview.png", rendered(overview, "png"))
    for section in sections:
        for picture in section.pictures:
            write_atomically(
                folder / f"{section.slug}-{picture.name}.png", rendered(picture.figure, "png")
            )

    environment = Environment(
        loader=PackageLoader("maml_pipeline.tools.report", "."),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_data"] = as_data
    values = {
        "sections": sections,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "config_link": lambda run: _config_link(run, folder),
        "finished": sum(run.is_finished for run in runs),
        "runs": runs,
    }
    for file in ("report.html", "report.md"):
        write_atomically(folder / file, environment.get_template(f"{file}.jinja").render(values))
    return folder / "report.html"


def rendered(figure: Figure, kind: str) -> bytes:
    """Return a figure as `svg` or `png`, the same bytes each time."""
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def as_data(figure: Figure) -> str:
    """Return a figure as the address of an image that lies in the page itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(rendered(figure, "svg")).decode()


def _config_link(run: Run, folder: Path) -> str | None:
    """Return the way from the report to a run's config, where it is a file."""
    config = run.source / "config.yaml"
    return os.path.relpath(config, folder) if config.is_file() else None
