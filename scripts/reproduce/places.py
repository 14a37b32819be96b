"""Where the scripts of this folder keep runs and results; a trial keeps them apart from both."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maml_pipeline.files import write_atomically


@dataclass(frozen=True)
class Places:
    """Where runs and results are.

    Args:
        runs: Folder of the runs.
        results: File of the results.
        is_trial: Whether all is as short as possible.
        is_published: Whether the results are those of the documents.
    """

    runs: Path
    results: Path
    is_trial: bool
    is_published: bool

    def write(self, results: Any) -> None:
        """Write the file of results."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.results, json.dumps(results, indent=1) + "\n")

    def picture(self, published: Path) -> Path:
        """Return where to draw a picture: beside the results unless these are published."""
        return published if self.is_published else self.results.parent / published.name


def parse_places(
    parser: ArgumentParser, runs: Path, file: str, arguments: list[str] | None = None
) -> tuple[Namespace, Places]:
    """Parse the command line, with the options that all scripts have.

    Args:
        parser: Of the script; gets the options.
        runs: Default folder of the runs.
        file: Default name of the file of results, in results/.
        arguments: `None` for those of the process.

    Returns:
        All settings; those that the options name.
    """
    trial = Path("runs", "trial")
    results = Path("results", file)
    short = f"as few meta-steps as possible, all in {trial} unless told otherwise"
    parser.add_argument("--tiny", action="store_true", help=f"a trial: {short}")
    parser.add_argument("--runs", type=Path, help=f"folder of the runs (default: {runs})")
    parser.add_argument("--results", type=Path, help=f"file of the results (default: {results})")
    settings = parser.parse_args(arguments)
    if settings.tiny:
        runs, results = trial, trial / file
    is_published = not settings.tiny and settings.results is None
    return settings, Places(
        settings.runs or runs, settings.results or results, settings.tiny, is_published
    )
