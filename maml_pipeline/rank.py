"""The rank of this process among those of a training."""

from pytorch_lightning.utilities import rank_zero_only


def is_rank_zero() -> bool:
    """Return whether this process has global rank 0, the only one that prints and writes files.

    Lightning reads the rank from the environment on import and updates it with the trainer.
    """
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]
