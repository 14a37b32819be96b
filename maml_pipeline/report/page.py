"""One page of what runs have come to: as HTML that needs no network, as Markdown, and as PNG."""

import base64
import html
import os
import re
import warnings
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
from maml_pipeline.report.comparison import Row, compare, findings, headers
from maml_pipeline.report.plots import Picture, draw_overview, draw_pictures
from maml_pipeline.report.style import style
from maml_pipeline.runs.folder import CONFIG
from maml_pipeline.runs.run import Run
from maml_pipeline.text import printable

LONGEST_SLUG = 80
"""Characters; a file's name may have 255 bytes, and a picture's name follows."""

MOST_PIXELS = 60_000
"""A PNG's width and height are less than 2**16 in Matplotlib."""


@dataclass(frozen=True)
class Section:
    """One experiment of the page.

    Args:
        name: The experiment, and what tells it from others of its name.
        slug: The same as part of a file's name, which no other section has.
    """

    name: str
    slug: str
    rows: list[Row]
    headers: tuple[str, ...]
    findings: list[str]
    pictures: list[Picture]


def write_report(runs: Sequence[Run], folder: Path, left_out: Sequence[str] = ()) -> Path:
    """Write `report.html`, `report.md` and the pictures as PNG: all of them, or none.

    Args:
        runs: In the order of `find_runs`.
        folder: Where to; it is made. Files of an earlier report are replaced.
        left_out: What is not reported, a line each.

    Returns:
        The path of `report.html`, which holds its pictures itself.

    Raises:
        UserError: The folder cannot be made, or written to.
    """
    files = _render(runs, folder, left_out)
    is_new = not folder.exists()
    make_folder(folder, "out")
    try:
        _write(files, folder)
    except OSError as error:
        if is_new:
            folder.rmdir()
        raise UserError(
            f"out {folder} cannot be written to ({error.strerror}); name another folder"
        ) from error
    return folder / "report.html"


def _render(runs: Sequence[Run], folder: Path, left_out: Sequence[str]) -> dict[str, bytes]:
    """Return the report's files by name; `report.html` is the last."""
    experiments = compare(runs)
    slugs = _slugs(experiments)
    sections = [
        Section(name, slugs[name], rows, headers(rows), findings(rows), draw_pictures(rows))
        for name, rows in experiments.items()
    ]
    files = {"overview.png": rendered(draw_overview(experiments), "png")}
    for section in sections:
        for picture in section.pictures:
            files[f"{section.slug}-{picture.name}.png"] = rendered(picture.figure, "png")

    environment = Environment(
        loader=PackageLoader("maml_pipeline.report", "."),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"as_data": as_data, "md": in_markdown}
    values = {
        "sections": sections,
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
    """Write all files beside their places, then move them in: a full disk leaves the earlier report."""
    for name in files:
        if (folder / name).is_dir():
            raise IsADirectoryError(EISDIR, f"{name} is a folder")
    with TemporaryDirectory(prefix=".report-", dir=folder) as unfinished:
        for name, content in files.items():
            write_atomically(Path(unfinished) / name, content)
        for name in files:
            (Path(unfinished) / name).replace(folder / name)


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Return a part of a file's name for each name: short, plain, and no other name's."""
    slugs: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
        slug = plain[:LONGEST_SLUG]
        # Some file systems do not tell upper from lower case.
        if slug != plain or not slug or slug.lower() in taken:
            slug = f"{slug}-{sha256(name.encode()).hexdigest()[:8]}".lstrip("-")
        taken.add(slug.lower())
        slugs[name] = slug
    return slugs


def in_markdown(text: object) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, and no end of a table's cell."""
    escaped = html.escape(printable(text), quote=False)
    return re.sub(r"([\\`*_\[\]|~$]|:(?=//|\w+:))", r"\\\1", escaped)


def rendered(figure: Figure, kind: str) -> bytes:
    """Return a figure as `svg` or `png`, the same bytes each time."""
    buffer = BytesIO()
    with style(), warnings.catch_warnings():
        # A name in letters that the font lacks: the file shows boxes, and the tables show the name.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(
            buffer,
            format=kind,
            metadata={"Date": None} if kind == "svg" else None,
            dpi=min(mpl.rcParams["savefig.dpi"], MOST_PIXELS / max(figure.get_size_inches())),
        )
    return buffer.getvalue()


def as_data(figure: Figure) -> str:
    """Return a figure as the address of an image that lies in the page itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(rendered(figure, "svg")).decode()


def _config_link(run: Run, folder: Path) -> str | None:
    """Return the relative address of a run's config in the report, where it is a file.

    It begins with `./` or `../`: a folder `javascript:...` is a folder.
    """
    config = run.source / CONFIG
    if not config.is_file():
        return None
    path = os.path.relpath(config, folder)
    return quote(os.fsencode(path if path.startswith("..") else f"./{path}"))
