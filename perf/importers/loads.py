"""What readers share of a load: the words for it, and that failed requests are refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from perf.importers.fields import Fields

FROM_SENT = "times count from when a request was sent, not from when it was due"
NEED_VALUES = "TPOT P95 and ITL P99 are left out, for they need the values of each request: {}"
COARSE = (
    "ITL is left out: {} of {} requests have fewer chunks than tokens, so that a gap is of several tokens"
)


def refuse_failed(found: Fields, failed: int, of: int) -> None:
    """Raise GateError if requests failed: what the others took says nothing of a load that was not served."""
    if failed:
        raise found.refuse(f"{failed} of {of} requests failed: mend that, and run the tool again")


def refuse_empty(found: Fields, requests: int, tokens: int) -> None:
    """Raise GateError if no request ended well, or none gave a token."""
    if not requests or not tokens:
        raise found.refuse(f"has {requests} requests with {tokens} output tokens: nothing was measured")


def rate_of(found: Fields, value: object) -> float:
    """A request rate: a number above 0, or infinite. Raises GateError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise found.refuse(f"request rate {value!r} is not known here: import runs of a fixed rate")


def arrivals(rate: float, burstiness: float = 1.0, at_most: int | None = None) -> str:
    """The words for when requests come: `rate` a second, infinite if at once, with `at_most` at a time.

    Their gaps are of a gamma distribution of this shape: 1 is a Poisson process, infinite a constant rate.
    """
    if math.isinf(rate):
        return "all" if at_most is None else f"concurrency:{at_most}"
    if burstiness == 1:
        words = f"poisson:{rate:g}"
    elif math.isinf(burstiness):
        words = f"constant:{rate:g}"
    else:
        words = f"gamma:{rate:g}, burstiness {burstiness:g}"
    return words if at_most is None else f"{words}, at most {at_most}"


def described(value: Any, without: Collection[str] = ()) -> str:
    """An option of a tool in words, of objects what is set in them: `{"kind": "text", "n": 3, "x": null}` is
    `kind text, n 3`."""
    if isinstance(value, Mapping):
        kept = {key: some for key, some in value.items() if key not in without and some not in (None, [], {})}
        return ", ".join(f"{key} {_nested(some)}" for key, some in kept.items())
    if isinstance(value, list):
        return "; ".join(map(described, value))
    return str(value)


def _nested(value: Any) -> str:
    words = described(value)
    return f"({words})" if isinstance(value, Mapping | list) else words
