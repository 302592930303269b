"""Compilation by Numba: a whole is one program made of parts, and a later start loads it from the cache.

Here alone methods of Numba's compiler are overridden. They are no public interface: tests/test_jit.py finds
each of them called by the Numba that is installed, and pyproject.toml bounds its version.
"""

from __future__ import annotations

import gc
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
# Nothing counts references to arrays: whoever calls a whole holds them until it returns, and counting them
# took longer than attention of a short context. A division by zero is no error.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}


class _PartLibrary(codegen.JITCodeLibrary):
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
        """Do without the environment: a program would need it to raise."""


class _PartCompiler(compiler.Compiler):
    """Numba's compiler, as far as to LLVM's code of the function itself."""

    def compile_extra(self, func: Any) -> Any:
        self.state.flags.no_cpython_wrapper = self.state.flags.no_cfunc_wrapper = True
        self.state.library = _PartLibrary(self.state.targetctx.codegen(), func.__qualname__)
        return super().compile_extra(func)


class _WholeCompiler(compiler.Compiler):
    """Numba's compiler, without a garbage collector: it makes objects by the million, and among all that
    models' libraries hold the collector would take a tenth of the time."""

    def compile_extra(self, func: Any) -> Any:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if was_enabled:
                gc.enable()


def part(**options: Any) -> Any:
    """Return a decorator of functions that only compiled ones call.

    A part is compiled for each set of argument types that it is called with. A literal is one of its own: 0
    is `Literal[int](0)` and not int64, for which the part would be compiled once more; 0.0 is float64, and
    makes a float32 that it is added to one. So literals that are passed to a part, or that a sum begins with,
    are written np.int64(0) and np.float32(0.0).

    A negative index counts from the end. Where one may be negative, as in x[begin + n], LLVM gathers numbers
    that it could load as a vector: so it is written x[np.uintp(begin + n)].
    """
    return numba.njit(pipeline_class=_PartCompiler, **OPTIONS, **options)


def whole(function: Callable[..., Any]) -> Any:
    """Return the function compiled when it is first called, without the interpreter's lock.

    The compiled code is kept for its source and processor.
    """
    options: dict[str, Any] = dict(nogil=True, pipeline_class=_WholeCompiler, **OPTIONS)
    before, CONFIG.CACHE_DIR = CONFIG.CACHE_DIR, str(_folder())
    try:  # Numba settles where a function is kept when it is decorated
        return numba.njit(function, cache=True, **options)
    except RuntimeError as error:
        LOG.warning("compiled code is not kept (%s)", error)
        return numba.njit(function, **options)
    finally:
        CONFIG.CACHE_DIR = before


@cache
def _folder() -> Path:
    """Return where compiled functions are kept; log that they are compiled if there are none yet.

    Numba compares a function's own file alone with the one that it has kept it for, so the folder is named
    after all of the files that go into it.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = cache_dir() / f"numba-{digest}"
    if not folder.exists():
        LOG.warning("compiling for this machine, once: some ten seconds")
    return folder
