"""A run written into pytest-benchmark's storage as its FileStorage would: whole or not at all, over no
other."""

from __future__ import annotations

import json
import os
from pathlib import Path

from perf.gate.entries import Flat
from perf.gate.storage import SAVED, check_name, folder


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
