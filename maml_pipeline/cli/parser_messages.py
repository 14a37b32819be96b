"""Rewrite messages of argparse and jsonargparse as one line: key, value, and what it must be."""

import re

from maml_pipeline.limits import MAX_SEED

LONGEST_VALUE = 80
LONGEST = 350

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "Sequence": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
RESTRICTIONS = {
    "PositiveInt": "a whole number from 1",
    "NonNegativeInt": "a whole number from 0",
    "Seed": f"a whole number from 0 to {MAX_SEED}",
}

# Lines of jsonargparse about a value that matches none of several types.
_FRAME = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Given value|Expected a path but|"
    r"Unable to load config|Subclass types expect|a class path \(str\)|a dict with|"
    r"Problem with given class_path '[^']*':$"
)
_VALUES = [
    re.compile(pattern)
    for pattern in (
        r"Given value: (.*)",
        r"Got value: (.*)",
        r"Expected a dot import path string: (.*)",
        r"invalid literal for int\(\) with base 10: '(.*)'",
        r"Unable to load config ['\"](.*)['\"]$",
    )
]
# Messages of argparse.
_INVALID = re.compile(rf"argument (\S+): invalid ({'|'.join(TYPES)}) value: '(.*)'")
_NOT_A_CHOICE = re.compile(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)")
_DONE = re.compile(r"([\w.]+)( is .*; it must be .*|: .*)")
_KEY = re.compile(r'-?\s*Parser key "([^"]+)":\s*')


def one_line(message: str) -> str:
    """Rewrite a parser's message as one line.

    Args:
        message: One or more lines. jsonargparse's name the key, each type that was tried, why it does
            not match, and the value.
    """
    if found := _INVALID.fullmatch(message):
        return _text(found[1], found[3], [TYPES[found[2]]], [])
    if found := _NOT_A_CHOICE.fullmatch(message):
        return _text(found[1], found[2], [_one_of(found[3])], [])
    keys: list[str] = []
    expected: list[str] = []
    reasons: list[str] = []
    value = None
    for line in (line.strip() for line in message.splitlines()):
        is_of_inner_key = False
        while found := _KEY.match(line):
            is_of_inner_key = bool(keys)
            _join(keys, found[1])
            line = line[found.end() :]
        line = line.removeprefix("- ")
        if (
            keys and not _FRAME.match(line) and (done := _DONE.match(line))
        ):  # from the parser of a nested class
            _join(keys, done[1])
            return f"{'.'.join(keys)}{done[2]}"
        for tried in _VALUES:
            if found := tried.search(line):
                value = value or found[1]
        if not line or _FRAME.match(line):
            continue
        line = re.sub(r"\.? ?Got value: .*$", "", line)
        if is_of_inner_key:
            expected, reasons = [], []
        if known := _expectation(line):
            expected.append(known)
        else:
            reasons.append(_plain(line))
        if is_of_inner_key:
            break  # the types tried after it say less about the value
    text = _text(".".join(keys), value, list(dict.fromkeys(expected)), list(dict.fromkeys(reasons)))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _text(key: str, value: str | None, expected: list[str], reasons: list[str]) -> str:
    if reasons:
        return f"{key}: {'; '.join(reasons)}" if key else "; ".join(reasons)
    if "a number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    expected = expected or ["keys with values, or the path of a YAML file that holds them"]
    if value is not None and len(value) > LONGEST_VALUE:
        value = value[: LONGEST_VALUE - 3] + "..."
    wanted = f"it must be {' or '.join(expected)}"
    if value is None or not key:
        return f"{key}: {wanted}" if key else wanted
    return f"{key} is {'null' if value == 'None' else value or 'empty'}; {wanted}"


def _join(keys: list[str], key: str) -> None:
    """Append the key of a class's argument to that of the class; a full key replaces both."""
    whole = ".".join(keys)
    if key == whole:
        return
    if key.startswith(f"{whole}."):
        keys.clear()
    keys.append(key)


def _expectation(line: str) -> str | None:
    """Return what a value must be according to a line of the message; `None` if it does not say."""
    if line.startswith("Expected a dot import path string"):
        return "the import path of a class or function"
    if found := re.match(r"Not a valid subclass of (\w+)", line):
        return f"the import path of a {found[1]}"
    if found := re.match(r"Not of type (\w+): (.*)", line):
        return RESTRICTIONS.get(found[1], found[2])
    if found := re.match(r"Expected an? typing\.Literal\[(.*)\]", line):
        return _one_of(found[1])
    if found := re.match(r"Expected an? <class '([\w.]+)'>", line):
        name = found[1].rpartition(".")[2]
        return TYPES.get(name, f"a {name}")
    return None


def _one_of(choices: str) -> str:
    names = choices.replace("'", "")
    return f"one of {names}" if "," in names else names


def _plain(line: str) -> str:
    line = re.sub(r"^Type .* expects a function or a callable class: ", "", line)
    line = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line)
    return line.removeprefix("argument ").rstrip(".")
