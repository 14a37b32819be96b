"""Limits of settings: range checks, and upper bounds that catch typing errors."""

import math
import operator

from maml_pipeline.errors import UserError

MAX_SEED = 2**32 - 1  # of NumPy's global generator, which Lightning seeds too
MAX_INNER_STEPS = 10_000  # each is a column of metrics.csv
MAX_EVALUATION_TASKS = 10_000_000
MAX_WORKERS = 256
MAX_IMAGE_SIZE = 4096
MAX_ACCUMULATED_BATCHES = 1_000_000
MAX_BATCHES = 10**15


def check_at_least(key: str, value: float, minimum: float) -> None:
    """Check that a setting is not below its minimum.

    Raises:
        UserError: The value is below the minimum, or NaN.
    """
    if not value >= minimum:
        raise UserError(f"{key} is {value}; it must be at least {minimum}")


def check_whole(key: str, value: int, minimum: int) -> None:
    """Check that a setting is a whole number and not below its minimum.

    Raises:
        UserError: It is not.
    """
    try:
        operator.index(value)
    except TypeError as error:
        raise UserError(f"{key} is {value}; it must be a whole number") from error
    check_at_least(key, value, minimum)


def check_positive(key: str, value: float) -> None:
    """Check that a setting is a finite number above 0.

    Raises:
        UserError: It is not.
    """
    try:
        is_valid = 0 < value < math.inf
    except TypeError:  # such as text
        is_valid = False
    if not is_valid:
        raise UserError(f"{key} is {value}; it must be a finite number above 0")
