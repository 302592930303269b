"""The one exception a caller of the engine is meant to read, and the checks of values that raise it.

A caller may give anything. What is wrong is found here before any work, so that no request can fail in the
middle of a step which it shares with others.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import field, fields
from typing import Any

UNBOUNDED = 1e300
KINDS = {int: "a whole number", float: "a finite number", bool: "True or False"}
SHORT = reprlib.Repr()
SHORT.maxlist = SHORT.maxtuple = SHORT.maxset = SHORT.maxfrozenset = SHORT.maxarray = 8
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 100


class InputError(ValueError):
    """A request that cannot be met as given: the message names the field, the bound and the way out."""


def shown(value: Any) -> str:
    """Return a value as errors show it: on one line, cut where it is long, and never failing."""
    try:
        return " ".join(SHORT.repr(value).splitlines())
    except Exception:  # a repr of the caller's may raise, and so does that of an int of thousands of digits
        return f"<{type(value).__name__}>"


def plain(value: Any) -> Any:
    """Return the Python number that a NumPy or torch scalar holds, and anything else as it is."""
    if isinstance(value, int | float | str):
        return value
    try:
        return value.item() if hasattr(value, "item") else value
    except Exception:  # an array of several, or no number at all: the caller's checks refuse it as it is
        return value


def check(name: str, value: Any, kind: type, low: float = 0, high: float = UNBOUNDED) -> Any:
    """Return `value` as an int, float or bool, as `kind` says; raise InputError if it is out of bounds.

    An int is a good float, a bool is no number, and neither is NaN. A scalar of NumPy or torch is as good as
    the Python number it holds.
    """
    number = plain(value)
    good = int | float if kind is float else kind
    if isinstance(number, good) and isinstance(number, bool) == (kind is bool):
        try:
            number = kind(number)
        except Exception:  # an int beyond all floats; a class of the caller's that can't be converted
            number = math.nan
        if low <= number <= high:
            return number
    form = "g" if kind is float else ""
    what, bound = KINDS[kind], f" from {low:{form}} to {high:{form}}"
    if kind is bool or low == -UNBOUNDED:
        bound = ""
    elif high >= UNBOUNDED:
        bound = f" of at least {low:{form}}"
    if high == math.inf:
        what = "a number"
    raise InputError(f"{name}={shown(value)} must be {what}{bound}")


def check_text(name: str, value: Any) -> str:
    """Return `value` as a plain str; raise InputError unless it is one that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InputError(f"{name}={shown(value)} must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name}={shown(value)} is no valid Unicode: character {error.start} is {value[error.start]!r}, "
            "half of a surrogate pair or a byte that is no UTF-8: give whole characters"
        ) from None
    return str.__str__(value)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise InputError unless `value` is one of the words allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name}={shown(value)} must be one of {', '.join(allowed)}")


def check_list(name: str, value: Any, what: str = "a list", *, ordered: bool = True) -> tuple[Any, ...]:
    """Return the items of a list, or of anything else that gives them in an order; `what` is said to be due.

    `ordered=False` takes sets too. Text, bytes and mappings are no lists, nor is what raises when read.
    """
    unfit, problem = str | bytes | bytearray | memoryview | Mapping, ""
    try:
        if not isinstance(value, unfit | Set if ordered else unfit):
            return tuple(value)
    except Exception as error:
        problem = "" if isinstance(error, TypeError) else f", and reading it raised {shown(error)}"
    raise InputError(f"{name}={shown(value)} must be {what}{problem}")


def check_type(name: str, value: Any, kind: type, way_out: str) -> None:
    """Raise InputError unless `value` is of this class."""
    if not isinstance(value, kind):
        raise InputError(f"{name}={shown(value)} must be of class {kind.__name__}: {way_out}")


def bounded(default: Any, kind: type, low: float = 0, high: float = UNBOUNDED, optional: bool = False) -> Any:
    """Return a dataclass field for `check_fields` to check; None is good if `optional` or the default."""
    metadata = {"bounds": (kind, low, high), "optional": optional or default is None}
    return field(default=default, metadata=metadata)


def check_fields(made: Any) -> None:
    """Check every field of a dataclass instance that is `bounded`, and keep it as the Python number it is."""
    for known in fields(made):
        value = getattr(made, known.name)
        if known.metadata and not (value is None and known.metadata["optional"]):
            object.__setattr__(made, known.name, check(known.name, value, *known.metadata["bounds"]))
