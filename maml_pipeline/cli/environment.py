"""Environment variables that libraries read as soon as they are imported."""

import os

from maml_pipeline.errors import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Where Lightning looks for the rank of a process, in this order, when it is imported."""


def check_environment() -> None:
    """Refuse a rank that is not a number, and take away one that is empty; imports nothing heavy.

    Raises:
        UserError: There is one.
    """
    for name in RANK_VARIABLES:
        value = os.environ.get(name)
        if value is None:
            continue
        if not value.strip():
            del os.environ[name]
        elif not value.strip().isdecimal():
            raise UserError(f"the environment variable {name} is {value}; it must be a number, or unset")
