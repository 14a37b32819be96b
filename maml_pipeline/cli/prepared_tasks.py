"""The tasks that a config names, with their data prepared."""

from collections.abc import Sequence
from typing import Any

from pytorch_lightning import Trainer

from maml_pipeline.cli.checked_command import CheckedCommand
from maml_pipeline.cli.checks import prepare_data


class PreparedTasks(CheckedCommand):
    """The tasks of `maml fit` with its arguments, prepared: `datamodule.tasks`.

    Only what the data need is checked, so that they can be prepared on a machine without the devices
    of the run.

    Args:
        arguments: The arguments after `maml fit`.

    Raises:
        UserError: A setting is invalid, or the data cannot be prepared.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__("fit", arguments, elsewhere=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer | None:  # type: ignore[override]
        """Prepare the data without building a trainer."""
        prepare_data(self.datamodule, self.settings)
        return None

    def run_command(self, command: str) -> None:
        """Run nothing."""
