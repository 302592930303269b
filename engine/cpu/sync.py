"""Threads that run one compiled function side by side, and meet in it.

A step of a model is one call that all threads make. Between its phases they wait for each other, spinning, for a phase
takes microseconds; what there is to do in a phase is numbered, and each thread takes the next number.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types

from engine.cpu.tile import INTEL, declared, intrinsic

PATIENCE = 4000  # looks at what others do before the processor is offered to whoever else wants it
PAUSE = "llvm.x86.sse2.pause" if INTEL else ""
_I64 = ir.IntType(64)
_give_way = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


@intrinsic
def take(typing, address):
    """Add one to the number at an address; gives what it was."""

    def call(context, builder, signature, args):
        at = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", at, _I64(1), "acq_rel")

    return types.int64(types.int64), call


@intrinsic
def look(typing, address):
    """The number at an address, which others may change meanwhile; pauses a moment."""

    def call(context, builder, signature, args):
        if PAUSE:
            builder.call(declared(builder.module, PAUSE, ir.FunctionType(ir.VoidType(), [])), [])
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8, typ=_I64)

    return types.int64(types.int64), call


@njit(error_model="numpy")
def meet(address, arrivals):
    """Come back when the number at `address` has been taken so often, this once included; gives that."""
    take(address)
    looked = 0
    while look(address) < arrivals:
        looked += 1
        if looked > PATIENCE:
            _give_way()
    return arrivals


class Team:
    """Threads that sleep until there is something to run.

    Args:
        size: how many, the caller's own included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._one = threading.Lock()
        self._job: Callable[[int], Any] = int
        self._errors: list[BaseException] = []
        self._starts = [threading.Semaphore(0) for _ in range(1, size)]
        self._ended = threading.Semaphore(0)
        for index, start in enumerate(self._starts, 1):
            threading.Thread(target=self._work, args=(index, start), name=f"team-{index}", daemon=True).start()

    def run(self, job: Callable[[int], Any]) -> None:
        """Call job(0) here and job(1), job(2), ... in the others, all at once; returns when all have.

        Raises what one of them raised.
        """
        with self._one:
            self._job = job
            for start in self._starts:
                start.release()
            try:
                job(0)
            finally:
                for _ in self._starts:
                    self._ended.acquire()
            if self._errors:
                raise self._errors.pop()

    def _work(self, index: int, start: threading.Semaphore) -> None:
        while True:
            start.acquire()
            try:
                self._job(index)
            except BaseException as error:
                self._errors.append(error)
            self._ended.release()


@cache
def team(size: int) -> Team:
    """The one of this size in this process."""
    return Team(size)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # a child has none of its parent's threads
