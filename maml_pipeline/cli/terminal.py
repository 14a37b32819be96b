"""What a command shows on the terminal: this project's own messages, not those of its libraries."""

import logging
import warnings

from maml_pipeline.rank import is_rank_zero
from maml_pipeline.text import printable_lines


def configure_logging() -> None:
    """Show this project's messages, and hide warnings of libraries that the user cannot act on."""
    own = logging.getLogger("maml_pipeline")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_PrintableFormatter())
        own.addHandler(handler)
    own.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    for source in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(source).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tasks are drawn faster than they are learned from
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # limit_val_batches=0
        ".*has `__len__` defined.*",  # exact here, whatever the number of workers
        ".*is smaller than the logging interval.*",  # which counts on over all epochs
        ".*LeafSpec.*",  # Lightning's use of PyTorch
        ".*callbacks used to create the checkpoint need to be provided.*",  # not to test it
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
        ".*`srun` command is available.*",  # a short run on a login node is nobody's mistake
    ):
        warnings.filterwarnings("ignore", message)


class _PrintableFormatter(logging.Formatter):
    """Escape control characters of names and paths, which a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))
