"""The noise of a machine: how much sessions of identical code differ on it, as far as anything saved tells.

It is known from groups of two or more sessions of one commit under one name, and from what a self-test found,
which lies beside the runs in NOISE_FILE: by fingerprint, benchmark and metric a variance of log values
between fresh processes. Only what has a benchmark's own fingerprint and identity counts for it. Groups with
uncommitted changes do not count: one commit may then be several codes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.errors import GateError
from perf.gate import stats
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS, is_amount
from perf.gate.saved_runs import Run, is_same_code, read
from perf.gate.storage import STORAGE, folder, groups

NOISE_FILE = "noise.json"
VERSION = 1
Key = tuple[str, frozenset[tuple[str, str | None]]]  # a benchmark's full name and fingerprint


@dataclass(frozen=True, slots=True)
class Spread:
    """A pooled variance of log values: squares around the means of their groups, and degrees of freedom."""

    squares: float = 0.0
    df: float = 0.0

    @classmethod
    def of(cls, values: Iterable[Sequence[float]]) -> Spread:
        """The spread of groups of log values, each around its own mean."""
        known = [(sum(group) / len(group), group) for group in values if group]
        squares = sum((value - mean) ** 2 for mean, group in known for value in group)
        return cls(squares, float(sum(len(group) - 1 for _, group in known)))

    @property
    def variance(self) -> float:
        return self.squares / self.df

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.squares + other.squares, self.df + other.df)


@dataclass(frozen=True, slots=True)
class Found:
    """A self-test's finding: the variance of a metric's log values between processes, and its degrees of
    freedom."""

    benchmark: str
    fingerprint: Mapping[str, str | None]
    metric: str
    variance: float
    df: float


@dataclass(frozen=True)
class Noise:
    """All that is known of a machine's noise.

    groups: by benchmark, those of its sessions that measured one code, group by group. found: a self-test's
    findings. notes: what could not be read.
    """

    groups: Mapping[Key, Sequence[Sequence[Benchmark]]] = field(default_factory=dict)
    found: Mapping[tuple[Key, str], Spread] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, benchmark: Benchmark, metric: str) -> Spread:
        """The noise of a benchmark's metric; with 0 degrees of freedom where nothing is known."""
        key, identity = key_of(benchmark.fullname, benchmark.fingerprint), benchmark.identity()
        values = []
        for group in self.groups.get(key, ()):
            alike = [b.rounds[metric] for b in group if metric in b.rounds and b.identity() == identity]
            values.append([mean.value for mean in stats.means(alike)] if alike else [])
        return Spread.of(values) + self.found.get((key, metric), Spread())


def read_noise(storage: Path | str = STORAGE, without: Iterable[Run] = ()) -> Noise:
    """Read what a storage, given as to `perf.gate.storage.folder`, tells of its machine.

    A run that cannot be read is left out, and a note says so.

    Args:
        without: runs that are judged, whose sessions are left out here.

    Raises:
        GateError: if NOISE_FILE is there and is not what `write_noise` writes.
    """
    judged = {_file(path) for run in without for path in run.paths if path.is_file()}
    found: dict[Key, list[list[Benchmark]]] = {}
    notes = []
    for paths in groups(storage):
        sessions = []
        for path in paths:
            if _file(path) not in judged:
                try:
                    sessions.append(read(path))
                except GateError as error:
                    notes.append(f"not counted for this machine's noise: {error}")
        for group in _by_code(sessions):
            measured: dict[Key, list[Benchmark]] = {}
            for benchmark in (b for session in group for b in session.benchmarks.values()):
                if "" not in benchmark.problems:
                    key = key_of(benchmark.fullname, benchmark.fingerprint)
                    measured.setdefault(key, []).append(benchmark)
            for key, benchmarks in measured.items():
                found.setdefault(key, []).append(benchmarks)
    known = {
        (key_of(one.benchmark, one.fingerprint), one.metric): Spread(one.variance * one.df, one.df)
        for one in _read(folder(storage) / NOISE_FILE)
    }
    return Noise(found, known, tuple(notes))


def write_noise(storage: Path | str, findings: Iterable[Found]) -> Path:
    """Keep a self-test's findings beside the runs, in place of older ones of the same; gives the file.

    It is whole at every moment.

    Raises:
        GateError: if the file that is there is not what this writes.
    """
    path = folder(storage) / NOISE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(key_of(one.benchmark, one.fingerprint), one.metric): one for one in (*_read(path), *findings)}
    records = [
        {
            "benchmark": one.benchmark,
            "fingerprint": dict(one.fingerprint),
            "metric": one.metric,
            "variance": one.variance,
            "df": one.df,
        }
        for one in known.values()
    ]
    text = json.dumps({"version": VERSION, "noise": records}, indent=1, allow_nan=False)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
    fresh.write_text(f"{text}\n", encoding="utf-8")
    os.replace(fresh, path)
    return path


def _read(path: Path) -> list[Found]:
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']!r} is not {VERSION}")
        return [_found(record) for record in data["noise"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        way_out = "delete it, and python -m perf selftest measures it again"
        raise GateError(f"{str(path)!r} is no record of a machine's noise ({what}): {way_out}") from None


def _found(record: Mapping[str, Any]) -> Found:
    one = Found(**record)
    prints = {key: value for key, value in one.fingerprint.items() if isinstance(value, str | None)}
    if not isinstance(one.benchmark, str) or len(prints) < len(one.fingerprint):
        raise ValueError("a benchmark and its fingerprint must be text")
    if one.metric not in METRICS or not is_amount(one.variance) or not is_amount(one.df) or not one.df:
        what = f"variance {one.variance!r} with df {one.df!r}"
        raise ValueError(f"{one.metric!r} of {one.benchmark} has {what}")
    return one


def _by_code(sessions: Collection[Run]) -> list[list[Run]]:
    """Sessions of one name by the code that they measured; without those of which that is not certain."""
    found: list[list[Run]] = []
    for session in sessions:
        if session.commit.get("dirty"):
            continue
        group = next((group for group in found if is_same_code(group[0], session)), None)
        if group is None:
            found.append([session])
        else:
            group.append(session)
    return found


def key_of(name: str, fingerprint: Mapping[str, str | None]) -> Key:
    """What a benchmark and its machine are known by."""
    return name, frozenset(fingerprint.items())


def _file(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino
