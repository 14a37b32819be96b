"""The metrics that docs/metrics.md names."""

import re
from collections.abc import Iterable

from tests.helpers import ROOT

DOCUMENTED = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE
)
"""Names of metrics, some with placeholders such as `<measure>`."""


def undocumented(names: Iterable[str]) -> set[str]:
    """Return the logged names that the document does not have."""
    return {name for name in names if not any(matches(name, documented) for documented in DOCUMENTED)}


def matches(name: str, documented: str) -> bool:
    """Return whether a logged name is a documented one, with its placeholders filled in."""
    for part, meant in (("<measure>", "(loss|accuracy)"), ("<t>", r"\d+"), ("<layer>", r"[\w.]+")):
        documented = documented.replace(part, meant)
    return re.fullmatch(documented, name) is not None
