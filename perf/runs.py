"""Saved pytest-benchmark runs, read and checked: a JSON file becomes a Run of Benchmarks, or an error that says why.

Which file is meant is decided in perf/storage.py. It judges nothing and imports neither torch nor pytest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from perf import storage as storages
from perf.errors import Exit, GateError
from perf.metrics import GATED, METRICS
from perf.storage import STORAGE

Scalar = str | int | float | bool | None
SCHEMA = 1
_NESTED = ("fingerprint", "rounds", "gate")
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Tolerance:
    """A test's own limits for one metric; None keeps the table's. rel is a fraction, abs in the metric's unit."""

    rel: float | None = None
    abs: float | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark of a run.

    fullname: the test's node id. info: the flat extra_info (numbers are the median round's). rounds: for each metric
    one value a round, finite. fingerprint: what must be equal for a comparison to mean anything. tolerances: the
    test's own, by metric. problems: what is wrong with the record itself, by metric ("" for all of it).
    """

    fullname: str
    group: str
    info: Mapping[str, Scalar]
    rounds: Mapping[str, tuple[float, ...]]
    fingerprint: Mapping[str, str | None]
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: _EMPTY)
    problems: Mapping[str, str] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, slots=True)
class Run:
    """A saved run. name: what it was saved as; commit and machine: as pytest-benchmark recorded them. notes:
    what a reader should know of how it was found."""

    name: str
    path: Path
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    datetime: str
    benchmarks: Mapping[str, Benchmark]
    notes: tuple[str, ...] = ()


def find(which: str | Path, storage: Path | str = STORAGE) -> Path:
    """The file of a saved run; arguments and errors are those of `perf.storage.resolve`."""
    return storages.resolve(which, storage).path


def load(which: str | Path, storage: Path | str = STORAGE) -> Run:
    """Read and check a saved run; `which` and `storage` are as for `perf.storage.resolve`.

    Raises:
        GateError: if it cannot be found or read, is not a pytest-benchmark run, or has no benchmarks in it.
    """
    found = storages.resolve(which, storage)
    try:
        data = json.loads(found.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        where = str(found.path)
        raise GateError(f"run {where!r} cannot be read as JSON ({error}): measure it again") from None
    return replace(parse(data, found.path), notes=(found.note,) if found.note else ())


def parse(data: Any, path: Path | str) -> Run:
    """A Run from pytest-benchmark's own dict (what `pytest_benchmark_update_json` sees). Raises as `load` does."""
    path = Path(path)
    entries = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise GateError(f"run {str(path)!r} is not a pytest-benchmark run: it has no list 'benchmarks'")
    if not entries:
        raise GateError(
            f"run {str(path)!r} is empty: every benchmark was skipped, deselected or ended with an error; "
            "look at its pytest output (-rs says why a test was skipped)"
        )
    benchmarks: dict[str, Benchmark] = {}
    machine = _mapping(data.get("machine_info"))
    for entry in entries:
        name = entry.get("fullname") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise GateError(f"run {str(path)!r} has a benchmark without a fullname: measure it again")
        if name in benchmarks:
            raise GateError(f"run {str(path)!r} has {name} twice: measure it once a run")
        benchmarks[name] = _benchmark(name, entry, machine)
    stem = path.stem.split("_", 1)
    name = stem[1] if len(stem) == 2 and stem[0].isdigit() else path.stem
    return Run(name, path, machine, _mapping(data.get("commit_info")), str(data.get("datetime", "")), benchmarks)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _benchmark(name: str, entry: dict[str, Any], machine: dict[str, Any]) -> Benchmark:
    extra = _mapping(entry.get("extra_info"))
    group = str(extra.get("group") or entry.get("group") or "")
    problems: dict[str, str] = {}
    rounds: dict[str, tuple[float, ...]] = {}
    if "rounds" in extra:
        raw, fingerprint = _mapping(extra["rounds"]), _mapping(extra.get("fingerprint"))
        if extra.get("schema") != SCHEMA:
            problems[""] = f"is of schema {extra.get('schema')!r}, not {SCHEMA}: measure it again with this version"
        elif not fingerprint:
            problems[""] = "has no fingerprint: measure it again"
        elif not raw:
            problems[""] = "has no rounds: measure it again"
    else:  # a plain pytest-benchmark test: its time is all that can be judged
        raw = {"round_s": _mapping(entry.get("stats")).get("data")}
        keys = ("machine", "system", "python_version")
        fingerprint = {key: machine.get(key) for key in keys} | {"cpu": _mapping(machine.get("cpu")).get("brand_raw")}
        if not raw["round_s"]:
            raw, problems[""] = (
                {},
                "has no per-round data: use the perf_case fixture, or save with --benchmark-save-data",
            )
    for metric, values in raw.items():
        if metric not in METRICS or metric not in GATED:
            problems[metric] = f"is not a gated metric (they are {', '.join(GATED)})"
        elif not isinstance(values, list) or not values:
            problems[metric] = "has no values"
        elif bad := [value for value in values if not _finite(value)]:
            problems[metric] = f"has {bad[0]!r} among its rounds, which is not a finite number of 0 or more"
        else:
            rounds[metric] = tuple(float(value) for value in values)
    info = {key: value for key, value in extra.items() if key not in _NESTED}
    tolerances = _tolerances(name, extra.get("gate"))
    prints = {str(key): None if value is None else str(value) for key, value in fingerprint.items()}
    return Benchmark(name, group, info, rounds, prints, tolerances, problems)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _tolerances(name: str, raw: Any) -> dict[str, Tolerance]:
    """The JSON string that the marker `perf_gate` became."""
    if raw is None:
        return {}
    try:
        parsed = json.loads(raw)
        return {metric: check_tolerance(metric, **limits) for metric, limits in parsed.items()}
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise GateError(f"{name}: gate={raw!r} is not a JSON object of tolerances ({error})", Exit.USAGE) from None


def check_tolerance(metric: str, rel: float | None = None, abs: float | None = None) -> Tolerance:
    """The arguments of `@pytest.mark.perf_gate(metric, rel=..., abs=...)`, checked.

    Raises:
        GateError: for an unknown or exact metric, neither limit given, or a limit that is not a number of 0 or more.
    """
    if metric not in GATED:
        raise GateError(f"perf_gate({metric!r}): no such gated metric; they are {', '.join(GATED)}", Exit.USAGE)
    if METRICS[metric].direction == "exact":
        raise GateError(f"perf_gate({metric!r}): a counter is compared exactly and takes no tolerance", Exit.USAGE)
    if rel is None and abs is None:
        raise GateError(f"perf_gate({metric!r}): give rel=, abs= or both", Exit.USAGE)
    for limit, value in (("rel", rel), ("abs", abs)):
        if value is not None and not _finite(value):
            raise GateError(f"perf_gate({metric!r}): {limit}={value!r} must be a number of 0 or more", Exit.USAGE)
    if rel is not None and rel >= 1:
        raise GateError(f"perf_gate({metric!r}): rel={rel} is a fraction and must be below 1 (0.1 is 10 %)", Exit.USAGE)
    return Tolerance(rel, abs)
