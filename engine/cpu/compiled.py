"""How functions are compiled: the whole of them once, and a later start loads it from the cache folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import compiler

from engine.machine import cache_dir

LOG = logging.getLogger(__name__)
CONFIG: Any = numba.config


class _Plainly(compiler.Compiler):
    """Numba's compiler, less LLVM's optimisation."""

    def compile_extra(self, func: Any) -> Any:
        before, CONFIG.OPT = CONFIG.OPT, type(CONFIG.OPT)(0)
        try:
            return super().compile_extra(func)
        finally:
            CONFIG.OPT = before


def part(**options: Any) -> Any:
    """Decorates a function that only compiled ones call.

    Whoever calls it takes in its code and optimises all of it, so that doing so here was a third of the wait.
    """
    return numba.njit(error_model="numpy", pipeline_class=_Plainly, **options)


def whole(function: Callable[..., Any]) -> Any:
    """The function compiled when it is called, without the interpreter's lock; kept for its source and processor."""
    before, CONFIG.CACHE_DIR = CONFIG.CACHE_DIR, str(_folder())
    try:  # where a function is kept is settled when it is decorated
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError as error:
        LOG.warning("what is compiled is not kept (%s)", error)
        return numba.njit(function, nogil=True, error_model="numpy")
    finally:
        CONFIG.CACHE_DIR = before


@cache
def _folder() -> Path:
    """Where compiled functions are kept; says so if there are none yet, for that takes a moment.

    Numba tells by a function's own file whether what it has kept is still right, so the folder is named after all of
    the files that go into it.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = cache_dir() / f"numba-{digest}"
    if not folder.exists():
        LOG.warning("compiling for this machine, once: a quarter of a minute")
    return folder
