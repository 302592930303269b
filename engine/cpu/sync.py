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
from numba import types

from engine.cpu.compiled import part
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


@part()
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

    The caller is none of them: whatever interrupts it, all of them run a job to its end, or they would wait for each
    other forever.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._one = threading.Lock()
        self._job: tuple[Callable[[int], Any], list[BaseException | None]] = (int, [])
        self._starts = [threading.Semaphore(0) for _ in range(size)]
        self._ended = threading.Semaphore(0)
        for index, start in enumerate(self._starts):
            threading.Thread(target=self._work, args=(index, start), name=f"team-{index}", daemon=True).start()

    def run(self, job: Callable[[int], Any]) -> None:
        """Call job(0), job(1), ..., each in a thread of its own, all at once; returns when all have.

        Raises what one of them raised.
        """
        with self._one:
            ended: list[BaseException | None] = []
            self._job, interrupt = (job, ended), None
            while len(ended) < self.size:
                try:
                    for start in self._starts:  # once more after an interrupt: who has begun takes no notice
                        start.release()
                    while len(ended) < self.size:
                        self._ended.acquire()
                except KeyboardInterrupt as error:
                    interrupt = error
            for raised in (interrupt, *ended):
                if raised is not None:
                    raise raised

    def _work(self, index: int, start: threading.Semaphore) -> None:
        last = None
        while True:
            start.acquire()
            job, ended = self._job
            if ended is last:
                continue
            last, raised = ended, None
            try:
                job(index)
            except BaseException as error:
                raised = error
            ended.append(raised)
            self._ended.release()


@cache
def team(size: int) -> Team:
    """The one of this size in this process."""
    return Team(size)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # a child has none of its parent's threads
