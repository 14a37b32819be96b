"""`maml configs`: list the configs that ship with the package, or print one of them."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from maml_pipeline.cli.parser import Parser
from maml_pipeline.errors import UserError
from maml_pipeline.shipped_files import SWEEP, shipped_configs


def run(arguments: Sequence[str]) -> None:
    """List the shipped configs, or print the one that is named.

    Args:
        arguments: The arguments after `maml configs`.

    Raises:
        UserError: There is no such config.
    """
    parser = Parser(
        prog="maml configs",
        usage="maml configs [NAME]",
        description="List the configs that ship with the package. `--config NAME` uses one of them; "
        "`maml configs NAME` prints it, to be saved and edited.",
        examples=("maml configs", "maml configs sine > my_sine.yaml"),
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the config to print")
    name = parser.parse_args(arguments).name
    configs = {**shipped_configs(), SWEEP.stem: SWEEP}
    if name is None:
        _list(configs)
    elif name in configs:
        print(configs[name].read_text(encoding="utf-8"), end="")
    else:
        raise UserError(f"there is no config {name}; the configs are {', '.join(configs)}")


def _list(configs: dict[str, Path]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, file in configs.items():
        table.add_row(name, _summary(file))
    Console(markup=False, emoji=False, highlight=False).print(table)


def _summary(file: Path) -> str:
    """Return the first sentence of the comment at the top of a config."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=\.) +(?=[A-Z]|maml )", comment, maxsplit=1)[0]  # not at "et al. 2017"
