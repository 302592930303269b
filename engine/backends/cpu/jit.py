"""How functions are compiled: the whole of them once, and a later start loads it from the cache folder."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import codegen, compiler

from engine.machine import cache_dir

LOG = logging.getLogger(__name__)
CONFIG: Any = numba.config


class _Code(codegen.JITCodeLibrary):
    """LLVM's code of a part: neither optimised nor turned into a program, for whoever calls it takes it in.

    A program of it would not only cost time. It would be there first under its name, and the whole, whose own
    optimised copy has the same name, would be linked to it.
    """

    def _optimize_functions(self, ll_module: Any) -> None:
        pass

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    @property
    def codegen(self) -> Any:  # asked for nothing but `set_env`
        return self

    def set_env(self, env_name: str, env: Any) -> None:
        """What a program would need to raise."""


class _Plainly(compiler.Compiler):
    """Numba's compiler, as far as to LLVM's code of the function itself."""

    def compile_extra(self, func: Any) -> Any:
        self.state.flags.no_cpython_wrapper = self.state.flags.no_cfunc_wrapper = True
        self.state.library = _Code(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


def part(**options: Any) -> Any:
    """Decorates a function that only compiled ones call."""
    return numba.njit(error_model="numpy", pipeline_class=_Plainly, **options)


def whole(function: Callable[..., Any]) -> Any:
    """The function compiled when it is called, without the interpreter's lock; kept for its source and
    processor."""
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

    Numba tells by a function's own file whether what it has kept is still right, so the folder is named after
    all of the files that go into it.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = cache_dir() / f"numba-{digest}"
    if not folder.exists():
        LOG.warning("compiling for this machine, once: some ten seconds")
    return folder
