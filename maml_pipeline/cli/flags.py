"""Flags of the commands beside training."""

import argparse
from typing import NoReturn

from maml_pipeline.errors import UserError


class OneLineErrors(argparse.ArgumentParser):
    """A parser whose errors are a line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong as a `UserError`."""
        raise UserError(message.removeprefix("argument "))
