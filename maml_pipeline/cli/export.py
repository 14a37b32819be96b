"""`maml export`: write the network of a run to a file that needs no maml_pipeline to load."""

from collections.abc import Sequence
from pathlib import Path

from maml_pipeline.cli.parser import Parser, path_argument
from maml_pipeline.files import expand_home
from maml_pipeline.text import counted, printable


def run(arguments: Sequence[str]) -> None:
    """Export a network, and print what was written.

    Args:
        arguments: Those after `maml export`.

    Raises:
        UserError: An argument is invalid, the run has no readable checkpoint, or the file exists.
    """
    parser = Parser(
        prog="maml export",
        usage="maml export RUN_DIR OUT.safetensors|OUT.pt [--which best|last]",
        description="Write the state_dict of a run's network, its meta-learned initial parameters, to a "
        "file that loads into the plain PyTorch module. OUT.yaml beside it has the network's class and "
        "arguments, how it adapts to a task, and the run that trained it.",
        examples=("maml export runs/toy-second-s0 toy.safetensors",),
    )
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=path_argument, help="the run's folder")
    add("out", metavar="OUT", type=path_argument, help="a new file that ends in .safetensors or .pt")
    add(
        "--which",
        choices=["best", "last"],
        default="best",
        help="checkpoint: best, or if nothing was validated the last; or last (default: best)",
    )
    settings = parser.parse_args(arguments)
    folder, out = (
        expand_home(Path(path), key) for path, key in ((settings.run, "RUN_DIR"), (settings.out, "OUT"))
    )
    # Imported late: PyTorch and Lightning take seconds to import, which help must not.
    from maml_pipeline.runs.export import export_network

    exported = export_network(folder, settings.which, out)
    print(
        f"{'Exported' if exported.is_new else 'Already exported'}: {exported.checkpoint.name} of "
        f"{printable(folder)}, from meta-step {exported.meta_step:,}"
    )
    tensors = counted(exported.tensors, "tensor")
    print(f"  {printable(exported.file)}: the network's state_dict, {tensors}")
    print(f"  {printable(exported.config)}: its class and arguments, and where it comes from")
