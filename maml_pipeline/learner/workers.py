"""Check that tasks can be sent to worker processes."""

import pickle
from typing import Any

from maml_pipeline.errors import UserError


class _Nowhere:
    """Discard what is pickled: tasks may hold a whole data set."""

    def write(self, data: Any) -> int:
        return len(data)


def check_picklable(tasks: object) -> None:
    """Check that tasks can be pickled, as spawned worker processes need.

    Raises:
        UserError: They hold an object that cannot be pickled, such as a lambda.
    """
    try:
        pickle.Pickler(_Nowhere()).dump(tasks)
    except Exception as error:  # pickling calls code of the user
        raise UserError(
            f"data.tasks: {type(tasks).__name__} cannot be sent to worker processes "
            f"({str(error).splitlines()[0]}): define what it holds at the top of a module, or set "
            "data.num_workers to 0"
        ) from error
