"""`maml prepare`: data put in place beforehand, for jobs on nodes that have no network."""

from collections.abc import Sequence

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.tasks import Omniglot
from maml_pipeline.tasks.omniglot_images import find_images


def run(arguments: Sequence[str]) -> None:
    """Download and pack what is missing of a data set, and print where it lies.

    Args:
        arguments: Those after `maml prepare`.

    Raises:
        UserError: The person can put it right.
    """
    parser = Parser(
        prog="maml prepare",
        description="Download a data set where it is missing, check that it is complete, and pack it "
        "into the cache that trainings read. Run it once, where there is a network, before you submit.",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", choices=["omniglot"], help="omniglot")
    parser.add_argument(
        "--root", type=path_argument, help="its folder (default: MAML_OMNIGLOT_ROOT, else data/omniglot)"
    )
    parser.add_argument(
        "--cache_dir", type=path_argument, help="folder of the cache (default: the user's)"
    )
    settings = parser.parse_args(arguments)
    Omniglot(root=settings.root, cache_dir=settings.cache_dir).prepare()
    halves, cache = find_images(settings.root, settings.cache_dir)
    print(f"Data:  {halves[0].resolve().parent}")
    print(f"Cache: {cache}")
