"""Compiled functions that a later start loads from the cache folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from engine.machine import cache_dir

LOG = logging.getLogger(__name__)


def kept(function: Callable[..., Any]) -> Any:
    """The function compiled when it is called, without the interpreter's lock; kept for its source and processor.

    Numba tells by a function's own file whether what it has kept is still right, so the folder is named after all of
    the files that go into it. The first time takes a moment, and says so.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = cache_dir() / f"numba-{digest}"
    if not folder.exists():
        LOG.warning("compiling for this machine, once: a quarter of a minute")
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:  # where a function is kept is settled when it is decorated
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError as error:
        LOG.warning("what is compiled is not kept (%s)", error)
        return numba.njit(function, nogil=True, error_model="numpy")
    finally:
        config.CACHE_DIR = before
