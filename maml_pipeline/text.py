"""Text to print: that from outside, such as names and paths, made safe; counts and numbers."""

import math
import textwrap
import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control characters, format characters (which reorder text, for example), lone
surrogates (bytes of a path that are not UTF-8), line and paragraph separators."""


def printable(text: object) -> str:
    r"""Escape every character that would act on a terminal or break a line, such as `\x1b` and `\n`.

    Args:
        text: Any text; other objects as `str` shows them.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in INVISIBLE else char
        for char in str(text)
    )


def printable_lines(text: object) -> str:
    """Escape as `printable` does, but keep line breaks."""
    return "\n".join(map(printable, str(text).split("\n")))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 cell` or `2,000 cells`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in its one or two largest units, such as `9.2 s`, `3 min 5 s` or `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, size, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def shortened(text: object, width: int) -> str:
    """Return printable text of at most `width` characters, truncated with dots.

    Args:
        text: Any text.
        width: At least 4.
    """
    shown = printable(text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def wrapped(text: object, width: int, lines: int = 2) -> str:
    """Wrap printable text to lines of at most `width` characters, truncated with dots.

    Args:
        text: Any text.
        width: Characters per line, at least 4.
        lines: Maximum number of lines.
    """
    return textwrap.fill(printable(text), width, max_lines=lines, placeholder="...")


def with_capital(text: str) -> str:
    """Return a text with a capital first letter; the rest, such as a name in it, is unchanged."""
    return text[:1].upper() + text[1:]


def with_small_initial(text: str) -> str:
    """Return a text with a small first letter; the rest, such as a name in it, is unchanged."""
    return text[:1].lower() + text[1:]


def in_one_notation(value: float, other: float) -> tuple[str, str]:
    """Return two numbers, such as a mean and its margin, in one notation: that of the first."""
    plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6
    kind = ".4f" if plain else ".2e"
    return f"{value:{kind}}", f"{other:{kind}}"
