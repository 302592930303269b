"""Strangers' text and numbers as they are shown: one printable line, no longer than there is room for.

A leaf: it knows no run, no chart and no format. Terminal, Markdown and page all take it from here.
"""

from __future__ import annotations

import sys
from itertools import accumulate, takewhile
from typing import Any

from rich.cells import cell_len

FLOAT_MAX = sys.float_info.max


def clean(text: Any) -> str:
    """One printable line: control and direction characters of a file become U+FFFD, line breaks spaces."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))


def middle(text: str, most: int, mark: str = "") -> str:
    """Text of at most `most` terminal cells: of a wider one both ends, with `mark` where its middle was."""
    if width(text) <= most:
        return text
    gap = f"…{mark}…" if mark else "…"
    left = (most - len(gap) + 1) // 2
    return f"{_begin(text, left)}{gap}{_begin(text[::-1], most - len(gap) - left)[::-1]}"


def width(text: str) -> int:
    """The terminal cells that text takes; what has no width counts as one, so that no length hides in it."""
    return len(text) if text.isascii() else sum(max(1, cell_len(c)) for c in text)


def _begin(text: str, most: int) -> str:
    """As much of the beginning of text as `most` cells hold."""
    taken = accumulate(width(c) for c in text)
    return text[: sum(1 for _ in takewhile(lambda cells: cells <= most, taken))]


def number(value: object) -> str:
    """A value in four digits, thousands with commas; None is a dash, true is on."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if not isinstance(value, int | float):
        return "-" if value is None else clean(value)
    if not -FLOAT_MAX <= value <= FLOAT_MAX:
        return clean(value) if isinstance(value, float) else f"{'-' if value < 0 else ''}very large"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def signed(ratio: float | None) -> str:
    """A relative change as a percentage with its sign: 0.031 is +3.1%."""
    return "-" if ratio is None else f"{ratio:+.1%}"
