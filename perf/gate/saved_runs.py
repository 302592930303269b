"""Saved pytest-benchmark runs, read and checked: a JSON file becomes a Run, or an error that says why.

Which file is meant is decided in perf/gate/storage.py, what an entry of it says in perf/gate/entries.py. It
judges nothing and imports neither torch nor pytest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.errors import GateError
from perf.gate import entries
from perf.gate.entries import Benchmark
from perf.gate.storage import STORAGE, resolve

# This project's own benchmarks were in perf/ itself: runs of then have them there, and still compare.
MOVED = re.compile(
    r"perf/(test_(?:batch_size|load|memory|peers|policies|roofline|scale|startup)\.py::"
    r"test_(?:batch_size|open_load|prefix_reuse|memory|peers|policy|prefill|decode|scale|startup)\[.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A saved run.

    name: what it was saved as. commit, machine: as pytest-benchmark recorded them. notes: how it was found,
    where a reader should know.
    """

    name: str
    path: Path
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    datetime: str
    benchmarks: Mapping[str, Benchmark]
    notes: tuple[str, ...] = ()


def load(which: str | Path, storage: Path | str = STORAGE) -> Run:
    """Read and check a saved run; `which` and `storage` are as for `perf.gate.storage.resolve`.

    Raises:
        GateError: if it cannot be found or read, is not a pytest-benchmark run, or has no benchmarks in it.
    """
    found = resolve(which, storage)
    try:
        data = json.loads(found.path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        where = str(found.path)
        raise GateError(f"run {where!r} cannot be read as JSON ({error}): measure it again") from None
    return replace(parse(data, found.path), notes=(found.note,) if found.note else ())


def parse(data: Any, path: Path | str) -> Run:
    """A Run from pytest-benchmark's own dict; raises as `load` does."""
    path = Path(path)
    found = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise GateError(f"run {str(path)!r} is not a pytest-benchmark run: it has no list 'benchmarks'")
    if not found:
        raise GateError(
            f"run {str(path)!r} is empty: every benchmark was skipped, deselected or ended with an error; "
            "look at its pytest output (-rs says why a test was skipped)"
        )
    benchmarks: dict[str, Benchmark] = {}
    machine = entries.mapping(data.get("machine_info"))
    for entry in found:
        name = entry.get("fullname") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise GateError(f"run {str(path)!r} has a benchmark without a fullname: measure it again")
        name = f"perf/benchmarks/{moved[1]}" if (moved := MOVED.fullmatch(name)) else name
        if name in benchmarks:
            raise GateError(f"run {str(path)!r} has {name} twice: measure it once a run")
        benchmarks[name] = entries.read(name, entry, machine)
    stem = path.stem.split("_", 1)
    name = stem[1] if len(stem) == 2 and stem[0].isdigit() else path.stem
    commit = entries.mapping(data.get("commit_info"))
    return Run(name, path, machine, commit, str(data.get("datetime", "")), benchmarks)
