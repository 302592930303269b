"""The one exception a caller of the engine is meant to read, and the checks of values that raise it."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

UNBOUNDED = 1e300
KINDS = {int: "a whole number", float: "a finite number", bool: "True or False"}


class InputError(ValueError):
    """What the caller gave cannot be done: the message names the field, the bound and the way out."""


def check(name: str, value: Any, kind: type, low: float = 0, high: float = UNBOUNDED) -> None:
    """Raise InputError unless `value` is an int, a float or a bool as `kind` says, and from `low` to `high`.

    An int is a good float, a bool is no number, and neither is NaN.
    """
    fits = isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not fits or not low <= value <= high:
        form = "g" if kind is float else ""
        bound = f" of at least {low:{form}}" if high == UNBOUNDED else f" from {low:{form}} to {high:{form}}"
        raise InputError(f"{name}={value!r} must be {KINDS[kind]}{'' if kind is bool else bound}")


def bounded(default: Any, kind: type, low: float = 0, high: float = UNBOUNDED) -> Any:
    """A dataclass field and what `check_fields` shall hold it to; None is good where it is the default."""
    return field(default=default, metadata={"bounds": (kind, low, high)})


def check_fields(made: Any) -> None:
    """Check every field of a dataclass instance that is `bounded`."""
    for known in fields(made):
        value = getattr(made, known.name)
        if known.metadata and not (value is None and known.default is None):
            check(known.name, value, *known.metadata["bounds"])
