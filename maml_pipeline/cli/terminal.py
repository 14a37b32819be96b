"""Logging and warnings on the terminal: this project's messages, without noise from its libraries."""

import logging
import warnings

from maml_pipeline.rank import is_rank_zero
from maml_pipeline.text import printable_lines


def configure_logging() -> None:
    """Show this project's messages, and hide library warnings that the user cannot act on."""
    own = logging.getLogger("maml_pipeline")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_PrintableFormatter())
        own.addHandler(handler)
    own.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    for source in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(source).setLevel(logging.WARNING)
    for message in (
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # limit_val_batches=0
        ".*is smaller than the logging interval.*",  # which counts across epochs
        ".*callbacks used to create the checkpoint need to be provided.*",  # not needed to test it
        ".*Checkpoint directory .* exists and is not empty.*",  # those of a resumed run
        ".*`srun` command is available.*",  # a short run on a login node is fine
    ):
        warnings.filterwarnings("ignore", message)


class _PrintableFormatter(logging.Formatter):
    """Escape control characters in names and paths, which a terminal would execute."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))
