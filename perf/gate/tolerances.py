"""Tolerances of a test's metrics: the limits of its `perf_gate` marks, and how they hold.

The closest mark wins, limit by limit: a parameter's before its test's, then its class's, a derived one's
before its base's, then its module's, and last the project's own, which are marks of the whole session. A mark
on a test must be of use to that test; one on a class or a module is for those of its benchmarks that record
the metric, and there must be one; the project's are for whatever records the metric. It imports neither torch
nor pytest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perf.errors import Exit, GateError
from perf.gate.metrics import GATED, METRICS, TIME, Metric, is_amount

if TYPE_CHECKING:
    import pytest

    from perf.config import Settings

MARK = "perf_gate"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A test's own limits for one metric: rel is a fraction, abs in the metric's unit; the wider one holds.

    As with pytest.approx, abs alone is the whole limit, and beside rel alone stays the floor of the metrics'
    table, below which a change is nothing to anybody.
    """

    rel: float | None = None
    abs: float | None = None


def check_tolerance(metric: str, rel: float | None = None, abs: float | None = None) -> Tolerance:
    """The arguments of `@pytest.mark.perf_gate(metric, rel=..., abs=...)`, checked.

    Raises:
        GateError: for an unknown or exact metric, neither limit given, or one that is no number of 0 or more.
    """
    if fault := _fault(metric, rel, abs):
        raise _wrong(f"perf_gate({metric!r}): {fault}")
    return Tolerance(rel, abs)


def check_settings(settings: Settings) -> None:
    """Check the metrics and limits of a project's own tolerances.

    Raises:
        SettingsError: for one that no mark could have, naming the file and the key.
    """
    for metric, limits in settings.tolerances.items():
        if fault := _fault(metric, limits.get("rel"), limits.get("abs")):
            raise settings.error(f"tolerances.{metric}", f"cannot be: {fault}")


def _fault(metric: str, rel: float | None, abs: float | None) -> str | None:
    if metric not in GATED:
        return f"no such gated metric; they are {', '.join(GATED)}"
    if METRICS[metric].is_counter:
        return "a counter is compared exactly and takes no tolerance"
    if rel is None and abs is None:
        return "give rel=, abs= or both"
    for limit, value in (("rel", rel), ("abs", abs)):
        if value is not None and not is_amount(value):
            return f"{limit}={value!r} must be a number of 0 or more"
    if rel is not None and rel >= 1:
        return f"rel={rel} is a fraction and must be below 1 (0.1 is 10 %)"
    return None


def allowed(metric: Metric, own: Tolerance | None, base: float) -> tuple[float, float]:
    """Return how much worse a metric may get, its floor included: a fraction of base, and a log-ratio.

    Args:
        own: the test's limits, if it has any.
        base: the typical value that it would get worse than, in the metric's unit.
    """
    rel = metric.rel if own is None else own.rel or 0.0
    floor = metric.floor if own is None or own.abs is None else own.abs
    tolerance = max(rel, floor / base) if base else (math.inf if floor else rel)
    if base and math.isinf(tolerance) and metric.direction == "lower":
        return tolerance, math.log(floor) - math.log(base)  # the quotient is too large for a float
    return tolerance, metric.log_limit(tolerance)


def _wrong(message: str) -> GateError:
    return GateError(message, Exit.USAGE)


def read(name: str, text: Any) -> dict[str, Tolerance]:
    """The tolerances of a saved benchmark, from the JSON text that its marks became.

    Raises:
        GateError: with code 2 if it is anything else.
    """
    if text is None:
        return {}
    try:
        parsed = json.loads(text)
        return {metric: check_tolerance(metric, **limits) for metric, limits in parsed.items()}
    except GateError:
        raise
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _wrong(f"{name}: gate={text!r} is not a JSON object of tolerances ({error})") from None


def of(item: pytest.Item) -> tuple[str | None, frozenset[str]]:
    """The limits that hold for a test, as JSON text or None; and the metrics that its own marks name.

    Raises:
        GateError: for a mark that the gate could not use, or equally close ones that contradict each other.
    """
    found: dict[str, dict[str, float]] = {}
    said: dict[tuple[str, str], tuple[tuple[int, int], float]] = {}
    own: set[str] = set()
    marks = [(_place(item, node, mark), node, mark) for node, mark in item.iter_markers_with_node(MARK)]
    for place, node, mark in sorted(marks, key=lambda found: found[0]):  # the closest has the last word
        metric = _checked(mark)
        for limit, value in mark.kwargs.items():
            before = said.get((metric, limit))
            if before is not None and before[0] == place and before[1] != value:
                where = "this test" if node is item else node.name
                both = f"{limit}={before[1]} and {limit}={value}"
                raise _wrong(f"perf_gate({metric!r}) gives {both} for {where}: keep one")
            said[metric, limit] = place, value
            found.setdefault(metric, {})[limit] = value
        if node is item:
            own.add(metric)
    return json.dumps(found) if found else None, frozenset(own)


def check(items: Iterable[pytest.Item], narrowed: bool) -> None:
    """Check every mark of a session's tests before one of them runs.

    Args:
        items: what was collected.
        narrowed: only a part was collected, so that what a class or module is marked for may be absent.

    Raises:
        GateError: for a mark that the gate could not use, naming the test.
    """
    unused: dict[tuple[Any, int], str] = {}
    of_use: set[tuple[Any, int]] = set()
    for item in items:
        if item.get_closest_marker(MARK) is None:
            continue
        try:
            of(item)
        except GateError as error:
            raise GateError(f"{item.nodeid}: {error}", error.code) from None
        for node, mark in item.iter_markers_with_node(MARK):
            if node is item.session:
                continue
            why, key = _useless(item, mark.args[0]), (_owner(node, mark)[0], id(mark))
            what = f"perf_gate({mark.args[0]!r}) would have no effect"
            if why is None:
                of_use.add(key)
            elif node is item:
                raise _wrong(f"{item.nodeid}: {what}: {why}")
            else:
                unused[key] = f"{node.nodeid}: {what}: no benchmark here records that metric"
    for key, message in unused.items():
        if key not in of_use and not narrowed:
            raise _wrong(message)


def used(text: str | None, own: Collection[str], recorded: Collection[str]) -> str | None:
    """Return those limits of `text` whose metric was recorded, as JSON text again.

    Raises:
        GateError: for one of `own`, the test's own marks, that names another.
    """
    limits: Mapping[str, Any] = json.loads(text) if text else {}
    for metric in limits:
        if metric in own and metric not in recorded:
            timed = [name for name in GATED if not METRICS[name].is_counter]
            known = ", ".join(name for name in timed if name in recorded) or "no such metric"
            raise _wrong(f"perf_gate({metric!r}) has no effect: this benchmark records {known}")
    kept = {metric: limit for metric, limit in limits.items() if metric in recorded}
    return json.dumps(kept) if kept else None


def _checked(mark: pytest.Mark) -> str:
    """The metric of a mark whose arguments are right."""
    if len(mark.args) != 1 or not mark.kwargs or not set(mark.kwargs) <= {"rel", "abs"}:
        raise _wrong("perf_gate takes a metric, and rel= or abs= or both")
    check_tolerance(mark.args[0], **mark.kwargs)
    return str(mark.args[0])


def _useless(item: pytest.Item, metric: str) -> str | None:
    """Say why a mark can't change how a test is judged, as far as its fixtures tell."""
    fixtures = getattr(item, "fixturenames", ())
    if "perf_case" in fixtures:
        return f"perf_case gates what it records, and {TIME} is none of that" if metric == TIME else None
    if "benchmark" in fixtures:
        return None if metric == TIME else f"without perf_case a benchmark records its time alone, {TIME}"
    return "the test takes neither perf_case nor benchmark"


def _place(item: pytest.Item, node: Any, mark: pytest.Mark) -> tuple[int, int]:
    """The closeness of a mark, the greater the closer: by its node, then as the module's docstring says."""
    depth = len(node.listchain())
    if node is item:
        of_parameter = getattr(getattr(item, "callspec", None), "marks", ())
        return depth, int(any(mark is other for other in of_parameter))
    return depth, -_owner(node, mark)[1]


def _owner(node: Any, mark: pytest.Mark) -> tuple[Any, int]:
    """The carrier of a node's mark, and how far up it is: a class or one of its bases, else the node."""
    for distance, base in enumerate(getattr(getattr(node, "obj", None), "__mro__", ())):
        marks = vars(base).get("pytestmark", [])
        if any(mark is getattr(own, "mark", own) for own in (marks if isinstance(marks, list) else [marks])):
            return base, distance
    return node, 0
