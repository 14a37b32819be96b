"""The resolved and checked configuration of a training that is not run here."""

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Trainer

from maml_pipeline.cli.checked_command import CheckedCommand


class ResolvedConfig(CheckedCommand):
    """What `maml fit` would run with its arguments.

    `values` is the configuration as plain values; as YAML, `maml fit --config` accepts it.
    `target` is the run that would be started or resumed.

    Args:
        arguments: The arguments after `maml fit`.
        elsewhere: Whether the training will run on another machine.

    Raises:
        UserError: A setting is invalid.
    """

    def __init__(self, arguments: Sequence[str], elsewhere: bool = False) -> None:
        super().__init__("fit", arguments, elsewhere)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer | None:  # type: ignore[override]
        """Check the settings without building a trainer."""
        self.target = self.locate_and_check()
        return None

    def run_command(self, command: str) -> None:
        """Run nothing."""
