"""A configuration resolved and checked, and not run."""

from collections.abc import Sequence
from typing import Any

import yaml
from pytorch_lightning import Trainer

from maml_pipeline.cli.checks import check
from maml_pipeline.cli.training import MamlCLI


class ResolvedConfig(MamlCLI):
    """What `maml fit` would do with its arguments, after all checks that need no training.

    `text` is the configuration as YAML, which `maml fit --config` takes; `values` the same as a dict.

    Args:
        arguments: Those after `maml fit`.
        elsewhere: Whether the training will run on another machine.

    Raises:
        UserError: The person can put it right.
    """

    def __init__(self, arguments: Sequence[str], elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        super().__init__("fit", arguments)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer | None:  # type: ignore[override]
        """Check, and build none."""
        check(self, self.elsewhere)
        self.text: str = self._parser(self.command).dump(self.settings, skip_unset=False)
        self.values: dict[str, Any] = yaml.safe_load(self.text)
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""
