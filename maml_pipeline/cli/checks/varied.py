"""Which keys may be varied, so that a report chooses the value that validated best."""

from collections.abc import Mapping
from typing import Any

from maml_pipeline.errors import UserError
from maml_pipeline.runs.compatibility import MAY_CHANGE_ON_RESUME, is_listed
from maml_pipeline.tradeoff.grid import SET_BY_TRADEOFF
from maml_pipeline.varied import has_key, resolved_key

VALIDATED = (
    *("data.tasks", "data.val_tasks", "data.test_tasks", "model.loss", "model.metric"),
    *("model.eval_inner_steps", "model.transductive", "run.monitor", "run.mode"),
    *("trainer.limit_val_batches", "trainer.limit_test_batches"),
)
"""Keys that change what is validated: results with different values could not be compared."""


def check_varied(config: Mapping[str, Any]) -> None:
    """Check the keys in `run.varied` of a resolved config.

    Raises:
        UserError: A key cannot be varied, or is not one of the config.
    """
    for key in config["run"].get("varied") or ():
        check_may_vary("run.varied", key)
        if not has_key(config, key):
            resolved = resolved_key(config, key)
            known = f"did you mean {resolved}?" if has_key(config, resolved) else "as model.inner_lr"
            raise UserError(f"run.varied has {key}; it must list keys of config.yaml, {known}")


def check_may_vary(source: str, key: str) -> None:
    """Check that runs which differ in a key can be compared by validation.

    Args:
        source: The option or key that names it, for the message.
        key: With or without `init_args`.

    Raises:
        UserError: They cannot.
    """
    plain = key.replace(".init_args", "")
    if flag := SET_BY_TRADEOFF.get(plain):
        raise UserError(f"{source} has {key}; use --{flag} of `maml tradeoff`")
    if "." not in plain or plain == "run.varied":
        raise UserError(f"{source} has {key}; name a single setting, such as model.inner_lr")
    if is_listed(plain, VALIDATED):
        raise UserError(
            f"{source} has {key}, which changes what is validated, so that no value could be chosen by "
            f"validation; train a trade-off for each value, with --{key} VALUE --out DIR"
        )
    for listed, affected in MAY_CHANGE_ON_RESUME.items():
        if is_listed(plain, [listed.replace(".init_args", "")]):
            affected = affected.partition(":")[0]
            raise UserError(
                f"{source} has {key} ({affected}); give all runs the same, with --{key} VALUE"
            )
