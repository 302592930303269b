"""The machine that runs this: its processor, and where what was made for it once is kept."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_dir() -> Path:
    """$DYNAMIC_BATCH_CACHE, else $XDG_CACHE_HOME/dynamic-batch, else ~/.cache/dynamic-batch."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dynamic-batch")
    return Path(os.environ.get("DYNAMIC_BATCH_CACHE") or default).expanduser()


def cpu_name() -> str:
    """What tells one CPU model from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    kind = " ".join(names.get(field, "") for field in ("model name", "cpu family", "model", "stepping")).strip()
    return kind or platform.processor() or platform.machine()
