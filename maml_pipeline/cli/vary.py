"""The settings that a trade-off varies, with their values as `maml fit` reads them."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from maml_pipeline.cli.checks.varied import check_may_vary
from maml_pipeline.cli.resolved_config import ResolvedConfig
from maml_pipeline.errors import UserError
from maml_pipeline.varied import config_value, identity, resolved_key, value_text


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
        if keys.count(key) > 1:
            raise UserError(f"vary has {key} more than once; list all its values once: {key}=VALUE,...")
        check_may_vary("vary", key)
        if key in given:
            raise UserError(f"--{key} is set by --vary for each cell; leave one of them out")
