"""`maml prepare`: download a data set before jobs run on nodes without a network."""

from collections.abc import Sequence

from maml_pipeline.cli.parser import Parser, path_argument


def run(arguments: Sequence[str]) -> None:
    """Download a data set if it is missing, write its cache, and print where both are.

    Args:
        arguments: The command-line arguments after `maml prepare`.

    Raises:
        UserError: An argument is invalid, or the data set cannot be downloaded, is damaged or cannot
            be cached.
    """
    parser = Parser(
        prog="maml prepare",
        description="Download a data set if it is missing, check that it is complete, and write the "
        "cache that runs read. Run it once on a machine with a network before you submit jobs.",
        examples=("maml prepare omniglot --root /scratch/omniglot",),
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", choices=["omniglot"], help="omniglot")
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=path_argument,
        help="data folder (default: MAML_OMNIGLOT_ROOT, else data/omniglot)",
    )
    parser.add_argument(
        "--cache_dir",
        type=path_argument,
        metavar="DIR",
        help="cache folder (default: the user's cache folder)",
    )
    settings = parser.parse_args(arguments)
    # Imported late: PyTorch takes seconds to import, which help must not.
    from maml_pipeline.tasks import Omniglot
    from maml_pipeline.tasks.omniglot_download import find_or_download
    from maml_pipeline.tasks.omniglot_images import cache_path

    Omniglot(root=settings.root, cache_dir=settings.cache_dir).prepare()
    halves = find_or_download(settings.root)
    print(f"Data:  {halves[0].resolve().parent}")
    print(f"Cache: {cache_path(halves, settings.cache_dir)}")
