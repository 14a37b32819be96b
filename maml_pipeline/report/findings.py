"""The comparison of one experiment in sentences: its results, and how varied settings were chosen."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from maml_pipeline.gradient_order import GradientOrder
from maml_pipeline.report.choice import Choice, Setting, varied_in
from maml_pipeline.report.comparison import ComparisonRow
from maml_pipeline.report.gain import share_of_gain
from maml_pipeline.runs.run import Run
from maml_pipeline.text import counted, in_one_notation, printable, with_capital
from maml_pipeline.varied import setting_text, short_names, value_text


def findings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Describe, in a sentence for each second-order row, its result and cost relative to first order."""
    sentences = []
    for row in rows:
        if row.is_outdone or row.first_order_row is None:
            continue
        if row.result is None or row.first_order_row.result is None:
            continue
        own, other = row.result, row.first_order_row.result
        if own.split != other.split:
            continue
        costs = [
            f"{ratio:.2f} times the {name}"
            for name, cost in (("peak memory", "peak_bytes"), ("time", "meta_step_ms"))
            if (ratio := row.ratio(cost)) is not None
        ]
        steps = f"{row.inner_steps} inner step{'' if row.inner_steps == 1 else 's'}"
        split = {"test": "test", "val": "validation"}[own.split]
        measure = printable(row.runs[0].measure)
        mean, _ = in_one_notation(own.mean, own.ci95)
        baseline, _ = in_one_notation(other.mean, other.ci95)
        sentences.append(
            f"Trained with {steps}, {row.order.phrase}{_in_brackets(row)} reached a {split} "
            f"{measure} of {mean} and first order{_in_brackets(row.first_order_row)} "
            f"{baseline}{_share(row, rows)}" + (f", at {' and '.join(costs)}." if costs else ".")
        )
    return sentences


def _share(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> str:
    share = share_of_gain(row, rows)
    if share is None or row.order.differentiated_steps is None:
        return ""
    return f" ({round(100 * share)} % of second order's gain)"


def _in_brackets(row: ComparisonRow) -> str:
    return f" ({printable(setting_text(row.setting))})" if row.setting else ""


def choice_notes(rows: Sequence[ComparisonRow]) -> list[str]:
    """Describe, for the rows of one experiment, which keys were varied and how values were chosen."""
    choices = {id(row.choice): row.choice for row in rows if row.choice is not None}
    runs = [run for row in rows for run in row.runs]
    if choices:
        return _describe([*choices.values()], varied_in(runs), runs[0])
    if not rows[0].setting:
        return []
    keys = " and ".join(printable(name) for name in short_names(rows[0].setting).values())
    if len(varied_in(runs)) > 1:
        return [f"Varied: {keys}. Each order and number of inner steps was trained with a single value."]
    only = printable(setting_text(rows[0].setting))
    return [f"Varied: {keys}. All runs found have {only}, so there was nothing to choose from."]


def _describe(choices: Sequence[Choice], settings: Sequence[Setting], run: Run) -> list[str]:
    """Describe how the shown settings were chosen, and everything that limits the choice.

    Args:
        choices: Those of one experiment.
        settings: All its settings, in order.
        run: Any of its runs.
    """
    names = short_names(settings[0])
    values = "; ".join(
        f"{printable(names[key])} in {', '.join(dict.fromkeys(value_text(s[key]) for s in settings))}"
        for key in names
    )
    plural = "values" if len(names) > 1 else "value"
    best = "highest" if run.higher_is_better else "lowest"
    return [
        f"Varied: {values}. Each order and number of inner steps is compared with the {plural} that "
        f"validated best: {best} {printable(run.monitor)} of the best checkpoint, averaged over seeds. "
        "Test results play no part in the choice.",
        *_merged({_Row(c.order, c.inner_steps): [*_remarks(c, settings)] for c in choices}),
    ]


class _Row(NamedTuple):
    """The order and the inner steps of a choice."""

    order: GradientOrder
    inner_steps: int


def _merged(remarks: Mapping[_Row, Sequence[str]]) -> Iterator[str]:
    """Yield one sentence for all remarks on the same rows."""
    rows_of: dict[str, list[_Row]] = {}
    for row, found in remarks.items():
        for remark in found:
            rows_of.setdefault(remark, []).append(row)
    remarks_on: dict[tuple[_Row, ...], list[str]] = {}
    for remark, concerned in rows_of.items():
        remarks_on.setdefault(tuple(concerned), []).append(remark)
    for rows, same in remarks_on.items():
        is_every = len(rows) == len(remarks) > 1
        name = "Every order and number of inner steps" if is_every else _names(rows)
        yield f"{name}: {'; '.join(same)}."


def _names(rows: Sequence[_Row]) -> str:
    """Name rows in words, such as `First order, 1 and 5 inner steps; second order, 5 inner steps`."""
    steps: dict[GradientOrder, list[int]] = {}
    for row in rows:
        steps.setdefault(row.order, []).append(row.inner_steps)
    names = []
    for order, numbers in steps.items():
        *others, last = numbers
        before = f"{', '.join(map(str, others))} and " if others else ""
        plural = counted(last, "inner step") if not others else f"{last} inner steps"
        names.append(f"{order.phrase}, {before}{plural}")
    return with_capital("; ".join(names))


def _remarks(choice: Choice, settings: Sequence[Setting]) -> Iterator[str]:
    if choice.chosen is None:
        yield "nothing could be chosen, so all settings are shown"
    if choice.unfinished:
        yield f"compared without {_listed(choice.unfinished)} (not finished)"
    if choice.unvalidated:
        yield f"compared without {_listed(choice.unvalidated)} (never validated)"
    if choice.diverged:
        yield f"{_listed(choice.diverged)} diverged"
    lacking = {seed: found for seed, found in choice.missing_seeds.items() if found}
    if lacking and not choice.seeds:
        yield "no seed is finished with each setting"
    for seed, found in lacking.items() if choice.seeds else ():
        yield f"compared without seed {seed} (not finished with {_listed(found)})"
    if choice.chosen is None:
        return
    if choice.tied:
        tied = _listed([choice.chosen, *choice.tied])
        yield f"{tied} validated equally well, and the first is shown"
    for key, name in short_names(choice.chosen).items():
        if end := _end(choice.chosen[key], [setting[key] for setting in settings]):
            value = value_text(choice.chosen[key])
            yield f"{printable(name)} {value} is the {end} value tried: a better one may lie beyond it"


def _end(value: Any, tried: Sequence[Any]) -> str | None:
    """Tell whether a number is at an end of the three or more that were tried."""
    if any(isinstance(one, bool) or not isinstance(one, int | float) for one in tried):
        return None
    numbers = sorted({*tried})
    if len(numbers) < 3 or value not in (numbers[0], numbers[-1]):
        return None
    return "smallest" if value == numbers[0] else "largest"


def _listed(settings: Sequence[Setting]) -> str:
    """Join settings in words, such as `inner_lr 0.05, 0.1 and 0.4`."""
    texts = [printable(setting_text(setting)) for setting in settings]
    if len(settings[0]) == 1:  # several values would have commas themselves
        texts = [texts[0], *(value_text(value) for s in settings[1:] for value in s.values())]
        return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
    return " and ".join(texts)
