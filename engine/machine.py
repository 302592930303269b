"""The machine that runs this: its processor, and where what was made for it once is kept."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_dir() -> Path:
    """$DYNAMIC_BATCH_CACHE, else $XDG_CACHE_HOME/dynamic-batch, else ~/.cache/dynamic-batch."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dynamic-batch")
    return Path(os.environ.get("DYNAMIC_BATCH_CACHE") or default).expanduser()


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What tells one CPU model from another: its name and, since clouds give many the same, family and stepping.

    Where the kernel does not tell, what Python calls it.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names: dict[str, str] = {}
    for line in lines:
        field, _, value = line.partition(":")
        names.setdefault(field.strip(), value.strip())
    kind = " ".join(names.get(field, "") for field in ("model name", "cpu family", "model", "stepping")).strip()
    return kind or platform.processor() or platform.machine()
