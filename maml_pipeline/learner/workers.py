"""Processes that draw tasks ahead, and what can be sent to them."""

import pickle
from typing import Any

from maml_pipeline.errors import UserError


class _Nowhere:
    """Takes what is pickled, and keeps nothing of it: tasks may hold a whole data set."""

    def write(self, data: Any) -> int:
        return len(data)


def check_picklable(tasks: object) -> None:
    """See that tasks can be sent to the processes that draw them, which start afresh.

    Raises:
        UserError: They hold something that has no name of its own, such as a lambda.
    """
    try:
        pickle.Pickler(_Nowhere()).dump(tasks)
    except Exception as error:  # whatever a class raises that is asked for its state
        raise UserError(
            f"data.tasks: {type(tasks).__name__} cannot be sent to worker processes "
            f"({str(error).splitlines()[0]}): define what it holds at the top of a module, or set "
            "data.num_workers to 0"
        ) from error
