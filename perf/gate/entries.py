"""A benchmark's entry in a pytest-benchmark file: the part that is ours, its writer and its one reader.

Everything of ours lies under one key of extra_info, KEY. All else there is a stranger's: shown, never judged.
Files from before that key have the record flat in extra_info, known by its whole shape. It imports neither
torch nor pytest.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from engine import InputError
from perf.gate import tolerances
from perf.gate.metrics import GATED, METRICS, TIME
from perf.gate.tolerances import Tolerance

KEY = "dynamic_batch"
SCHEMA = 2  # of the record under KEY
FLAT_SCHEMA = 1  # of the record that was extra_info itself
Scalar = str | int | float | bool | None
Flat = dict[str, Any]
NO_DATA = "has no per-round data: use the perf_case fixture, or save with --benchmark-save-data"
NESTED = ("fingerprint", "rounds", "gate")
# What a record says of itself; `perf_case.measure(extra=...)` and backends add to it under other names.
WHO = ("backend", "model", "workload", "group")  # strings, in every record of what was run
SETUP = ("model", "model_revision", "dtype", "device", "policy", "runner", "batch_size")
WHAT = ("schema", "group", "backend", *SETUP, "workload", "arrivals", "seed", *NESTED)
# Equal in both runs: other answers to other questions are no regression.
IDENTITY: tuple[str, ...] = ("backend", "model", "dtype", "device", "policy", "batch_size", "workload")
IDENTITY += ("arrivals", "seed", "requests", "offered_rate", "slo_ttft_ms", "slo_tpot_ms")
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of a run.

    fullname: the test's node id. info: our record, flat (numbers are the median round's); empty where there
    is none. rounds: for each metric one value a round, each fit to be judged. fingerprint: what must be equal
    for a comparison to mean anything. tolerances: the test's own, by metric. problems: what is wrong with the
    record itself, by metric ("" for all of it). notes: what in extra_info is not ours, to be shown and never
    judged. sessions: where several were put together, the rounds of each, which `rounds` has in one row.
    """

    fullname: str
    group: str
    info: Mapping[str, Scalar]
    rounds: Mapping[str, tuple[float, ...]]
    fingerprint: Mapping[str, str | None]
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: _EMPTY)
    problems: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    notes: Mapping[str, Scalar] = field(default_factory=lambda: _EMPTY)
    sessions: tuple[Mapping[str, tuple[float, ...]], ...] = ()

    def rounds_by_session(self, metric: str) -> list[tuple[float, ...]]:
        """The rounds of a metric that it has, session by session."""
        return [rounds[metric] for rounds in self.sessions or (self.rounds,)]

    def identity(self) -> dict[str, Scalar]:
        """Return what was run: equal wherever two values of a metric answer the same question."""
        return {key: self.info.get(key) for key in IDENTITY}


def read(name: str, entry: Mapping[str, Any], machine: Mapping[str, Any]) -> Benchmark:
    """The benchmark `name` from its entry, saved or still to be saved; `machine` is the run's machine_info.

    Raises:
        GateError: with code 2 for tolerances that are none.
    """
    extra = mapping(entry.get("extra_info"))
    record, schema = own(extra), SCHEMA
    others = {key: value for key, value in extra.items() if key != KEY or record is None}
    if record is None and _is_flat_record(extra):
        record, schema, others = extra, FLAT_SCHEMA, {}
    problems: dict[str, str] = {}
    if record is not None and ("rounds" in record or "fingerprint" in record):
        raw, fingerprint = mapping(record.get("rounds")), mapping(record.get("fingerprint"))
        if not fingerprint:
            problems[""] = "has no fingerprint: measure it again"
        elif not raw:
            problems[""] = "has no rounds: measure it again"
    else:  # a plain pytest-benchmark test: its time is all that can be judged
        raw, fingerprint = {TIME: mapping(entry.get("stats")).get("data")}, _machine(machine)
        if not raw[TIME]:
            raw = {}
            problems[""] = NO_DATA
    record = record or {}
    if record and record.get("schema") != schema:
        found = record.get("schema")
        problems[""] = f"is of schema {found!r}, not {schema}: measure it again with this version"
    rounds, unfit = _rounds(raw)
    return Benchmark(
        fullname=name,
        group=str(record.get("group") or entry.get("group") or ""),
        info={key: value for key, value in record.items() if key not in NESTED and _is_scalar(value)},
        rounds=rounds,
        fingerprint={str(key): None if value is None else str(value) for key, value in fingerprint.items()},
        tolerances=tolerances.read(name, record.get("gate")),
        problems=unfit | problems,
        notes={str(key): value for key, value in others.items() if _is_scalar(value)},
    )


def differences(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """Say in what two mappings differ, in words; empty where they are equal."""
    pairs = [(key, before.get(key), after.get(key)) for key in sorted({*before, *after})]
    return ", ".join(f"{key} {a or 'none'} -> {b or 'none'}" for key, a, b in pairs if a != b)


def own(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our record in an extra_info; None where there is none, whatever else somebody keeps under that name.

    It says what was run and has rounds and a fingerprint, or it is a plain benchmark's tolerances alone.
    """
    record = mapping(extra.get(KEY))
    if not _is_schema(record.get("schema")):
        return None
    measured = {"rounds", "fingerprint"} & record.keys()
    whole = len(measured) == 2 and _says_what(record)
    return record if whole or (not measured and _has_limits(record)) else None


def write(extra: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Put our record into an extra_info, or add to the one that is there.

    Raises:
        InputError: if somebody keeps another thing under its name.
    """
    if KEY in extra and own(extra) is None:
        raise InputError(f"extra_info[{KEY!r}] is where the gate keeps its record: give yours another name")
    extra[KEY] = {**(own(extra) or {"schema": SCHEMA}), **record}


def check_names(what: str, names: Mapping[str, Any]) -> None:
    """Raise InputError if values to be added to a record have names of its own; `what` is who gave them."""
    if clash := sorted(set(WHAT) & set(names)):
        names_own = ", ".join(clash)
        raise InputError(f"{what} has {names_own}, which the record says of itself: give it another name")


def plain(info: Mapping[str, Any]) -> Flat:
    """Return a mapping as plain Python: numpy's scalars unwrapped, all refused that JSON has no word for.

    Raises:
        ValueError: for NaN and infinity, or any other type, naming the key.
    """
    return {str(key): _plain(str(key), value) for key, value in info.items()}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return plain(value)
    if isinstance(value, list | tuple):
        return [_plain(key, entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}: it was not measured, and must be left out or None")
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{key} is {type(value).__name__}, which JSON has no word for")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """A mapping as a dict, and whatever is none as an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def _is_flat_record(extra: Mapping[str, Any]) -> bool:
    """Return whether extra_info itself is a record, as it was before KEY: one key alone may be anybody's."""
    rounds, fingerprint = mapping(extra.get("rounds")), mapping(extra.get("fingerprint"))
    gated = any(name in GATED and isinstance(values, list | tuple) for name, values in rounds.items())
    return _is_schema(extra.get("schema")) and _says_what(extra) and gated and bool(fingerprint)


def _is_schema(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _says_what(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(key), str) for key in WHO)


def _has_limits(record: Mapping[str, Any]) -> bool:
    """Return whether a record has the JSON text of limits by metric, be they right or not."""
    try:
        limits = json.loads(record["gate"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    found = limits.values() if isinstance(limits, dict) else ()
    return bool(found) and all(isinstance(limit, dict) for limit in found)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))


def _machine(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Stand-in for a fingerprint where none was recorded."""
    keys = ("machine", "system", "python_version")
    return {key: machine.get(key) for key in keys} | {"cpu": mapping(machine.get("cpu")).get("brand_raw")}


def _rounds(raw: Mapping[str, Any]) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """The rounds that can be judged, and what is wrong with the others, both by metric."""
    rounds: dict[str, tuple[float, ...]] = {}
    problems: dict[str, str] = {}
    for name, values in raw.items():
        if name not in GATED:
            problems[name] = f"is not a gated metric (they are {', '.join(GATED)})"
        elif not isinstance(values, list | tuple) or not values:
            problems[name] = "has no values"
        elif bad := [(value, why) for value in values if (why := METRICS[name].unfit(value))]:
            value, why = bad[0]
            problems[name] = f"has {reprlib.repr(value)} among its rounds, which {why}"
        else:
            rounds[name] = tuple(float(value) for value in values)
    return rounds, problems
