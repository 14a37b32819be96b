"""`maml prepare`: download and pack a data set before jobs run on nodes without a network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from maml_pipeline.cli.config_files import config_files
from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.errors import UserError

if TYPE_CHECKING:
    from maml_pipeline.tasks import TaskDistribution

HELP = ("-h", "--help")


def run(arguments: Sequence[str]) -> None:
    """Download a data set if it is missing, write its cache, and print where it is.

    Args:
        arguments: The command-line arguments after `maml prepare`.

    Raises:
        UserError: An argument is invalid, or the data set cannot be downloaded, is damaged or cannot
            be cached.
    """
    if any(config_files(arguments)) and not {*HELP} & {*arguments}:
        from maml_pipeline.cli.prepared_tasks import PreparedTasks  # late: help needs no Lightning
        from maml_pipeline.cli.terminal import configure_logging

        configure_logging()
        _print_summary(PreparedTasks(arguments).datamodule.tasks)
        return
    _prepare_omniglot(arguments)


def _prepare_omniglot(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="maml prepare",
        usage="maml prepare --config FILE [--KEY VALUE ...] | DATA [--root DIR] [--cache_dir DIR]",
        description="Download the data set of a config if it is missing, check that it is complete, and "
        "write the cache that runs read. Run it once where there is a network, before you submit jobs.",
        examples=(
            "maml prepare --config omniglot/5way_1shot",
            "maml prepare omniglot --root /scratch/omniglot",
        ),
        epilog="Keys are those of `maml fit`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        choices=["omniglot"],
        nargs="?",
        help="omniglot, without a config",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=path_argument,
        help="its folder (default: MAML_OMNIGLOT_ROOT, else data/omniglot)",
    )
    parser.add_argument(
        "--cache_dir",
        type=path_argument,
        metavar="DIR",
        help="its cache folder (default: the user's cache folder)",
    )
    settings = parser.parse_args(arguments)
    if settings.data is None:
        raise UserError("name a config, such as --config omniglot/5way_1shot, or omniglot")
    # Imported late: PyTorch takes seconds to import, which help must not.
    from maml_pipeline.tasks import Omniglot
    from maml_pipeline.tasks.omniglot_download import find_or_download

    tasks = Omniglot(root=settings.root, cache_dir=settings.cache_dir)
    tasks.prepare()
    print(f"Data:    {find_or_download(settings.root)[0].resolve().parent}")
    _print_summary(tasks)


def _print_summary(tasks: "TaskDistribution") -> None:
    from maml_pipeline.tasks.image_episodes import ImageEpisodes

    if not isinstance(tasks, ImageEpisodes):
        print(f"{type(tasks).__name__}: ready")
        return
    packed = tasks.packed
    number, channels, height, width = packed.images.shape
    used = {split: len(images.first) for split, images in tasks.split_images.items()}
    unused = len(packed.classes) - sum(used.values())
    print(f"Cache:   {packed.file}")
    print(f"Images:  {number:,} of {channels} x {height} x {width}")
    splits = ", ".join(f"{classes} {split}" for split, classes in used.items())
    print(f"Classes: {splits}" + (f"; {unused} not used" if unused else ""))
