"""A run written into pytest-benchmark's storage as its FileStorage would: whole or not at all, over no
other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perf.gate import entries
from perf.gate.entries import Flat
from perf.gate.storage import SAVED, check_name, folder


def entry(fullname: str, group: str, seconds: Sequence[float], record: Mapping[str, Any]) -> Flat:
    """Return a benchmark's entry: the time that each round took, and our record."""
    from pytest_benchmark.stats import Stats

    taken = Stats()
    for one in seconds:
        taken.update(one)
    about = {"group": group, "name": fullname.partition("::")[2], "fullname": fullname}
    extra: Flat = {}
    entries.write(extra, dict(record))
    stats = {**taken.as_dict(), "data": taken.data, "iterations": 1}
    return {**about, "params": None, "param": None, "extra_info": extra, "options": {}, "stats": stats}


def run_of(benchmarks: Sequence[Flat], machine: Mapping[str, Any]) -> Flat:
    """Return a run of these entries, with the commit of the folder that we stand in.

    Args:
        machine: pytest-benchmark's machine_info; empty where nobody knows which it was.
    """
    from pytest_benchmark import __version__
    from pytest_benchmark.utils import get_commit_info

    return {
        "machine_info": dict(machine),
        "commit_info": get_commit_info(),
        "benchmarks": list(benchmarks),
        "datetime": datetime.now(UTC).isoformat(),
        "version": __version__,
    }


def save(run: Flat, name: str, storage: Path | str) -> Path:
    """Write a run under the next number, and return its file.

    Raises:
        GateError: for a name that cannot be, or a storage that is no folder.
    """
    from pytest_benchmark.utils import get_machine_id

    check_name(name)
    home = folder(storage) / get_machine_id()
    home.mkdir(parents=True, exist_ok=True)
    fresh = home / f".{os.getpid()}.part"
    try:
        fresh.write_text(json.dumps(run, indent=4, allow_nan=False), encoding="utf-8")
        while True:
            taken = [int(parts[1]) for path in home.iterdir() if (parts := SAVED.fullmatch(path.name))]
            path = home / f"{max(taken, default=0) + 1:04d}_{name}.json"
            try:
                os.link(fresh, path)  # which fails where there is one
            except FileExistsError:
                continue
            return path
    finally:
        fresh.unlink(missing_ok=True)
