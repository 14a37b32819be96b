"""The cells of a trade-off as submitted to Slurm: their folders, and the file that the jobs read."""

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from maml_pipeline import run_folder
from maml_pipeline.errors import UserError
from maml_pipeline.files import remove_new_folders_on_error, write_atomically
from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.tradeoff.folder import Tradeoff
from maml_pipeline.tradeoff.grid import Cell
from maml_pipeline.varied import set_config_value


@contextlib.contextmanager
def reserved(tradeoff: Tradeoff, cells: Sequence[Cell], config: dict[str, Any]) -> Iterator[Path]:
    """Create the folder of a trade-off and those of cells that jobs will train, with their settings.

    The jobs read the settings from there: editing a config while they wait changes no cell. What exists
    is left alone. If the block raises, because the jobs were not submitted, everything is as before.

    Args:
        tradeoff: The whole grid.
        cells: Those to be trained.
        config: As returned by `Tradeoff.shared_config`.

    Yields:
        The file that lists the grid for the jobs, as `read_submitted` reads it.

    Raises:
        UserError: A folder cannot be created.
    """
    folders = [tradeoff.folder_of(cell) for cell in cells]
    grid = _as_json(tradeoff.cells)
    # Jobs with another grid may wait in the same folder.
    digest = hashlib.sha256(grid.encode()).hexdigest()[:8]
    file = tradeoff.folder / run_folder.SUBMITTED_CELLS.format(digest=digest)
    written = [file, tradeoff.config, *(folder / run_folder.CONFIG for folder in folders)]
    new = [path for path in written if not path.exists()]
    checkpoints = (folder / run_folder.CHECKPOINTS for folder in folders)
    with remove_new_folders_on_error(tradeoff.folder, *checkpoints):
        try:
            tradeoff.create(config)
            for cell, folder in zip(cells, folders, strict=True):
                _create_cell(folder, cell, config)
            write_atomically(file, grid)
            yield file
        except BaseException:
            for path in new:
                with contextlib.suppress(OSError):  # not created
                    path.unlink()
            raise


def read_submitted(file: Path) -> Tradeoff:
    """Return the trade-off whose cells a file lists, in the folder of the file.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        cells = [
            Cell(GradientOrder.parse(cell["order"]), cell["inner_steps"], cell["seed"], cell["varied"])
            for cell in json.loads(file.read_text())
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"submitted {file} does not list the cells of a trade-off; submit it again, with "
            "`maml submit --tradeoff`"
        ) from error
    return Tradeoff(file.parent, cells)


def _create_cell(folder: Path, cell: Cell, config: dict[str, Any]) -> None:
    run_folder.make_run_folder(folder, exist_ok=True)
    if not (folder / run_folder.CONFIG).exists():
        own = copy.deepcopy(config)
        for key, value in {**cell.settings, **cell.varied}.items():
            set_config_value(own, key, value)
        write_atomically(folder / run_folder.CONFIG, yaml.safe_dump(own, sort_keys=False))


def _as_json(cells: Sequence[Cell]) -> str:
    listed = [
        {
            "order": str(cell.order),
            "inner_steps": cell.inner_steps,
            "seed": cell.seed,
            "varied": cell.varied,
        }
        for cell in cells
    ]
    return json.dumps(listed, indent=1) + "\n"
