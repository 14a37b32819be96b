"""The settings that a trade-off varies: which keys may, and their values as `maml fit` reads them."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.errors import UserError
from maml_pipeline.runs.compatibility import MAY_CHANGE_ON_RESUME, is_listed
from maml_pipeline.tradeoff.grid import SET_BY_TRADEOFF
from maml_pipeline.varied import config_value, identity, resolved_key, value_text

VALIDATED = (
    *("data.tasks", "data.val_tasks", "data.test_tasks", "model.loss", "model.metric"),
    *("model.eval_inner_steps", "model.transductive", "run.monitor", "run.mode"),
    *("trainer.limit_val_batches", "trainer.limit_test_batches"),
)
"""Keys that change what is validated: results with different values could not be compared."""


def varied_settings_of(
    vary: Sequence[tuple[str, list[str]]], fit_arguments: Sequence[str], elsewhere: bool
) -> list[dict[str, Any]]:
    """Return every combination of the values, each checked with the whole config of `maml fit`.

    Args:
        vary: The keys and their values, as typed.
        fit_arguments: The other arguments of `maml fit`.
        elsewhere: Whether the cells will be trained on other machines.

    Returns:
        For each combination the values by key, both as in the resolved config; one empty combination if
        nothing is varied.

    Raises:
        UserError: A key cannot be varied, or a value is invalid or repeated.
    """
    _check_keys([key for key, _ in vary], fit_arguments)
    settings: list[dict[str, Any]] = []
    for texts in product(*(values for _, values in vary)):
        typed = [(key, text) for (key, _), text in zip(vary, texts, strict=True)]
        settings.append(_resolve(typed, fit_arguments, elsewhere) if typed else {})
    identities = [identity(setting) for setting in settings]
    for setting, one in zip(settings, identities, strict=True):
        if identities.count(one) > 1:
            values = ", ".join(f"{key} {value_text(value)}" for key, value in setting.items())
            raise UserError(f"vary has {values} more than once; list each value once")
    return settings


def _resolve(
    typed: Sequence[tuple[str, str]], fit_arguments: Sequence[str], elsewhere: bool
) -> dict[str, Any]:
    flags = [f"--{key}={text}" for key, text in typed]
    try:
        config = ResolvedConfig([*fit_arguments, *flags], elsewhere).values
    except UserError as error:
        values = ", ".join(f"{key}={text}" for key, text in typed)
        raise UserError(f"vary {values}: {error}") from error
    keys = sorted(resolved_key(config, key) for key, _ in typed)
    return {key: config_value(config, key) for key in keys}


def _check_keys(keys: Sequence[str], fit_arguments: Sequence[str]) -> None:
    given = [argument.partition("=")[0].removeprefix("--") for argument in fit_arguments]
    for key in keys:
        plain = key.replace(".init_args", "")
        if keys.count(key) > 1:
            raise UserError(f"vary has {key} more than once; list all its values once: {key}=VALUE,...")
        if flag := SET_BY_TRADEOFF.get(plain):
            raise UserError(f"vary has {key}; use --{flag}")
        if "." not in plain or plain == "run.varied":
            raise UserError(f"vary has {key}; name a single setting, such as model.inner_lr=0.1,0.4")
        if is_listed(plain, VALIDATED):
            raise UserError(
                f"vary has {key}, which changes what is validated, so that no value could be chosen by "
                f"validation; train a trade-off for each value, with --{key} VALUE --out DIR"
            )
        for listed, affected in MAY_CHANGE_ON_RESUME.items():
            if is_listed(plain, [listed.replace(".init_args", "")]):
                affected = affected.partition(":")[0]
                raise UserError(
                    f"vary has {key} ({affected}); give all cells the same, with --{key} VALUE"
                )
        if key in given:
            raise UserError(f"--{key} is set by --vary for each cell; leave one of them out")
