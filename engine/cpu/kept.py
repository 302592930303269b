"""Compiled functions that a later start loads from the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from engine.machine import cache_dir


def kept(function: Callable[..., Any]) -> Any:
    """The function compiled, without the interpreter's lock; kept for this source, Numba and processor.

    Numba tells by a function's own file whether what it has kept is still right, so the folder is named after all of
    the files that go into it.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(cache_dir() / f"numba-{digest}")
    try:  # where a function is kept is settled when it is decorated
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    finally:
        config.CACHE_DIR = before
