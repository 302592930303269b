"""Types of the plugin's options: text of the command line, checked where pytest can still say which option.

What is ours is imported when it is read: where it cannot be, one line says so.
"""

from __future__ import annotations

import argparse
import importlib
import math
from typing import Any

import pytest

from perf.shadow import USAGE, explain


def check_whole() -> None:
    """End the session with one line where ours cannot be imported, as where another package has its name."""
    try:
        importlib.import_module("perf.errors")
    except Exception as error:
        way_out = "rename it, or run pytest where it is not on the path"
        pytest.exit(f"error: {explain(error, way_out)}", returncode=USAGE)


def integers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def positive(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, 0 or more")
    return value


def slowdown(text: str) -> str:
    """A slowdown, as perf/measure/slowdown.py reads it; the text is kept."""
    _ours("perf.measure.slowdown", "Slowdown", text)
    return text


def target(text: str) -> str:
    """The address of a server; the text is kept."""
    _ours("perf.servers.target", "Target", text)
    return text


def slo(text: str) -> str:
    """Limits of a request, `ttft=200,tpot=50`, as perf/measure/slo.py reads them; the text is kept."""
    _ours("perf.measure.slo", "Slo", text)
    return text


def rates(text: str) -> list[float]:
    """Requests a second."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(1e-6 <= rate <= 1e6 for rate in found):
        raise argparse.ArgumentTypeError(f"{text!r} must be requests a second, from 1e-6 to 1e6: 1,2,4.5")
    return found


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ours(module: str, name: str, text: str) -> Any:
    """Return what a class of ours makes of a text by its `parse`."""
    check_whole()
    from engine import InputError

    try:
        return getattr(importlib.import_module(module), name).parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
