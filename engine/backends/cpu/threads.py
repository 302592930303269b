"""Threads that run one compiled function side by side, with barriers between its phases.

A step of a model is one call that all threads make. At a barrier they wait for each other, spinning, for a
phase takes microseconds. A phase's units of work are numbered, and threads claim the numbers from atomic
counters. Between steps threads spin on for some milliseconds: to wake one that sleeps takes a tenth of one.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import atexit
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

from engine.backends.cpu.jit import part, whole
from engine.backends.cpu.simd import I64, X86, declared, intrinsic

SPINS_BEFORE_YIELD = 4000  # then each spin offers the processor to whoever else wants it
SPINS_BEFORE_SLEEP = 10_000  # of a thread that waits for its next job
PAUSE_INTRINSIC = "llvm.x86.sse2.pause" if X86 else ""
_yield_processor = types.ExternalFunction(
    "SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32()
)


@intrinsic
def fetch_add(typing, address):
    """Add one to the number at an address; return the number before."""

    def call(context, builder, signature, args):
        at = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", at, I64(1), "acq_rel")

    return types.int64(types.int64), call


@intrinsic
def atomic_load(typing, address):
    """Return the number at an address that other threads may change."""

    def call(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8, typ=I64)

    return types.int64(types.int64), call


@intrinsic
def _pause(typing):
    """Let a moment pass, for the sake of what else the core does."""

    def call(context, builder, signature, args):
        if PAUSE_INTRINSIC:
            builder.call(declared(builder.module, PAUSE_INTRINSIC, ir.FunctionType(ir.VoidType(), [])), [])
        return context.get_dummy_value()

    return types.void(), call


@part()
def first_unit(units, thread, threads):
    """Return the first unit of a thread's share of units."""
    return units * thread // threads


@part()
def claim_first(counters, units, thread, threads):
    """Return the unit that a thread begins with: the first of its share, which no other thread may claim."""
    begin = first_unit(units, thread, threads)
    if begin < first_unit(units, thread + 1, threads):
        return begin
    return claim_unit(counters, units, thread, threads)


@part()
def claim_unit(counters, units, thread, threads):
    """Return the number of a unit of work that no thread has claimed, or `units` if there is none.

    A thread claims the units of its own share in order, and then what is left of others' shares: so it reads
    memory in order, and does not wait for a slower thread. The first of a share is left to `claim_first`: a
    thread that claims a unit before it computes one would leave others without any.

    Args:
        counters: address of an int64 for each thread, all 0 at first.
    """
    owner, begin = thread, first_unit(units, thread, threads)
    for _ in range(threads):
        end = first_unit(units, owner + 1, threads)
        if begin + 1 + atomic_load(counters + 8 * owner) < end:
            unit = begin + 1 + fetch_add(counters + 8 * owner)
            if unit < end:
                return unit
        owner, begin = (owner + 1, end) if owner + 1 < threads else (np.int64(0), np.int64(0))
    return units


@part()
def barrier(address, arrivals):
    """Arrive, and wait until so many arrivals are counted at an address, this one included; return them."""
    fetch_add(address)
    spins = 0
    while atomic_load(address) < arrivals:
        _pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            _yield_processor()
    return arrivals


@part()
def begin_together(thread, start):
    """Begin a job: the first thread, by the number at `start`, tells the others that they may begin too."""
    if thread == 0:
        fetch_add(start)


@whole
def _wait_for_change(address, before, max_spins):
    """Return the number at an address when it isn't `before` any more, or after so many spins."""
    spins = 0
    while atomic_load(address) == before and spins < max_spins:
        _pause()
        spins += 1
        if spins > SPINS_BEFORE_YIELD:
            _yield_processor()
    return atomic_load(address)


class Team:
    """The calling thread and `size` - 1 others, which run compiled jobs together.

    The others begin when the caller is in compiled code, and it leaves that when they are through: so an
    interrupt finds a job not begun or ended, and no thread waits for one that does not come.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs_begun = np.zeros(1, np.int64)
        self.start = self._jobs_begun.ctypes.data
        self._start_threads()

    def _start_threads(self) -> None:
        """Start the other threads; in a process that was forked again, for it has none of its parent's."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self._jobs_begun[0] = 0
        self._job: Callable[[int], Any] = int  # in place of none
        self._running = self._closed = False
        self._awake = [threading.Event() for _ in range(1, self.size)]
        self._threads = [
            threading.Thread(target=self._work, args=(index, awake), name=f"team-{index}", daemon=True)
            for index, awake in enumerate(self._awake, 1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, job: Callable[[int], Any]) -> None:
        """Call job(0) here and job(1), job(2), ... in the other threads.

        A job has to call one compiled function, without the interpreter's lock, that begins with
        `begin_together(index, team.start)` and ends with a `barrier` of all threads.
        """
        if self._process != os.getpid():
            self._start_threads()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads of this process have ended: the interpreter shuts down")
            try:
                self._job, self._running = job, True
                for awake in self._awake:
                    awake.set()
                job(0)
            finally:
                self._job, self._running = int, False  # a job may hold a model's weights

    def close(self) -> None:
        """End the other threads, once a job that runs is through.

        A thread that comes out of compiled code while the interpreter shuts down is ended within it, and that
        aborts the process.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            self._closed = True
            for awake in self._awake:
                awake.set()
        for thread in self._threads:
            thread.join()

    def _work(self, index: int, awake: threading.Event) -> None:
        seen = 0
        while not self._closed:
            begun = _wait_for_change(self.start, seen, SPINS_BEFORE_SLEEP)
            if begun != seen:
                seen = begun
                try:
                    self._job(index)
                except BaseException:  # the others wait for this thread forever
                    traceback.print_exc()
                    os.abort()
            elif not self._running:
                awake.wait()
                awake.clear()


@cache
def team(size: int) -> Team:
    """Return this process's one team of a size."""
    made = Team(size)
    atexit.register(made.close)
    return made
