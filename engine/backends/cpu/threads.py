"""Threads that run one compiled function side by side, and meet in it.

A step of a model is one call that all threads make. Between its phases they wait for each other, spinning,
for a phase takes microseconds; what there is to do in a phase is numbered, and each thread takes the next
number. Between steps they spin on for some milliseconds: to wake a thread that sleeps takes a tenth of one.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from engine.backends.cpu.gemm import INTEL, declared, intrinsic
from engine.backends.cpu.jit import part, whole

PATIENCE = 4000  # looks at what others do before the processor is offered to whoever else wants it
AWAKE = 10_000  # looks at whether there is something to do before a thread goes to sleep
PAUSE = "llvm.x86.sse2.pause" if INTEL else ""
_I64 = ir.IntType(64)
_give_way = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


@intrinsic
def fetch_add(typing, address):
    """Add one to the number at an address; gives what it was."""

    def call(context, builder, signature, args):
        at = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", at, _I64(1), "acq_rel")

    return types.int64(types.int64), call


@intrinsic
def atomic_load(typing, address):
    """The number at an address, which others may change meanwhile; pauses a moment."""

    def call(context, builder, signature, args):
        if PAUSE:
            builder.call(declared(builder.module, PAUSE, ir.FunctionType(ir.VoidType(), [])), [])
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "acquire", 8, typ=_I64)

    return types.int64(types.int64), call


@part()
def barrier(address, arrivals):
    """Come back when the number at `address` has been taken so often, this once included; gives that."""
    fetch_add(address)
    looked = 0
    while atomic_load(address) < arrivals:
        looked += 1
        if looked > PATIENCE:
            _give_way()
    return arrivals


@part()
def begin_together(thread, start):
    """What a job does first: the first thread tells the others, by the number at `start`, that they may begin
    too."""
    if thread == 0:
        fetch_add(start)


@whole
def _changed(address, before, looks):
    """The number at an address, when it is not what it was before or has been looked at so often."""
    looked = 0
    while atomic_load(address) == before and looked < looks:
        looked += 1
        if looked > PATIENCE:
            _give_way()
    return atomic_load(address)


class Team:
    """The calling thread and `size` - 1 others, which run compiled jobs together.

    The others begin when the caller is in compiled code, and it leaves that when they are through: so an
    interrupt finds a job not begun or ended, and no thread waits for one that does not come.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._one = threading.Lock()
        self._started = np.zeros(1, np.int64)  # jobs
        self.start = self._started.ctypes.data
        self._job: Callable[[int], Any] = int
        self._wanted = False
        self._awake = [threading.Event() for _ in range(1, size)]
        for index, awake in enumerate(self._awake, 1):
            threading.Thread(
                target=self._work, args=(index, awake), name=f"team-{index}", daemon=True
            ).start()

    def run(self, job: Callable[[int], Any]) -> None:
        """Call job(0) here and job(1), job(2), ... in the other threads.

        It has to call one compiled function, without the interpreter's lock, that begins with
        `begin_together(index, team.start)` and ends with a `barrier` of all threads.
        """
        with self._one:
            try:
                self._job, self._wanted = job, True
                for awake in self._awake:
                    awake.set()
                job(0)
            finally:
                self._job, self._wanted = int, False

    def _work(self, index: int, awake: threading.Event) -> None:
        seen = 0
        while True:
            started = _changed(self.start, seen, AWAKE)
            if started != seen:
                seen = started
                try:
                    self._job(index)
                except BaseException:  # the others wait for this thread forever
                    traceback.print_exc()
                    os.abort()
            elif not self._wanted:
                awake.wait()
                awake.clear()


@cache
def team(size: int) -> Team:
    """The one of this size in this process."""
    return Team(size)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # a child has none of its parent's threads
