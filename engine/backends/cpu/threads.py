"""Threads that run one compiled function side by side, with barriers between its phases.

A step of a model is one job that all threads run. At a barrier they wait for each other, spinning, for a
phase takes microseconds. A phase's units of work are numbered, and threads claim the numbers from atomic
counters. Between steps threads spin on for some milliseconds: to wake one that sleeps takes a tenth of one.

The caller alone comes from Python. It leaves a job's code and arguments in memory, where the others find them
within compiled code: none of them waits for the interpreter's lock, or reads Python's objects once more.
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
from numba.core import cgutils

from engine.backends.cpu.jit import part, whole
from engine.backends.cpu.simd import CACHE_LINE, I64, X86, declared, intrinsic
from engine.backends.cpu.vector_math import address

INT64_BYTES = 8
# What a team shares: how many jobs have begun; the one that did last; and how many threads have ended it.
BEGUN, FUNCTION, ARGUMENTS, THREADS, ENDED = 0, 8, 9, 10, 16
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
        if begin + 1 + atomic_load(counters + INT64_BYTES * owner) < end:
            unit = begin + 1 + fetch_add(counters + INT64_BYTES * owner)
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


@intrinsic
def job_of(typing, work, arguments):
    """Return a job, work(thread, threads, *arguments), as the addresses of its code and of the arguments.

    The arguments lie on the stack of the caller, who must outlast the job.

    Args:
        work: a part.
    """
    types_of_work = types.int64, types.int64, *arguments.types
    work_signature = work.get_call_type(typing, types_of_work, {})

    def call(context, builder, signature, args):
        packed = cgutils.alloca_once_value(builder, args[1])
        name = builder.module.get_unique_name("job")
        function = ir.Function(builder.module, _job_type(context), name)
        function.linkage = "internal"
        function.attributes.add("noinline")  # its caller runs it by its address, as other threads do
        thread, threads, at = context.call_conv.get_arguments(function)
        b = ir.IRBuilder(function.append_basic_block("entry"))
        unpacked = cgutils.unpack_tuple(b, b.load(b.inttoptr(at, packed.type)))
        context.get_function(work, work_signature)(b, [thread, threads, *unpacked])
        context.call_conv.return_value(b, context.get_dummy_value())
        addresses = [builder.ptrtoint(pointer, I64) for pointer in (function, packed)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.int64, 2)(work, arguments), call


@intrinsic
def _run_job(typing, function, thread, threads, arguments):
    """Call a job's code. (It can't raise.)"""

    def call(context, builder, signature, args):
        function = builder.inttoptr(args[0], _job_type(context).as_pointer())
        context.call_conv.call_function(builder, function, types.none, signature.args[1:], args[1:])
        return context.get_dummy_value()

    return types.void(function, thread, threads, arguments), call


def _job_type(context):
    return context.call_conv.get_function_type(types.none, (types.int64,) * 3)


@part()
def run_together(shared, threads, job):
    """Run a job in all threads of a team, in this one as thread 0, and wait for them.

    Args:
        shared, threads: the team's.
        job: of `job_of`.
    """
    shared[FUNCTION], shared[ARGUMENTS] = job
    shared[THREADS], shared[ENDED] = threads, 0
    fetch_add(address(shared) + INT64_BYTES * BEGUN)
    _run_job(shared[FUNCTION], 0, threads, shared[ARGUMENTS])
    barrier(address(shared) + INT64_BYTES * ENDED, threads)


@whole
def _take_part(shared, thread, begun, max_spins):
    """Run jobs as one of the other threads until none begins for so many spins; return how many have begun.

    Args:
        begun: how many had before.
    """
    spins = 0
    while spins < max_spins:
        if atomic_load(address(shared) + INT64_BYTES * BEGUN) == begun:
            _pause()
            spins += 1
            if spins > SPINS_BEFORE_YIELD:
                _yield_processor()
        else:
            begun, spins = begun + 1, 0
            _run_job(shared[FUNCTION], thread, shared[THREADS], shared[ARGUMENTS])
            fetch_add(address(shared) + INT64_BYTES * ENDED)
    return begun


class Team:
    """The calling thread and `size` - 1 others, which run compiled jobs together.

    The others begin when the caller is in compiled code, and it leaves that when they are through: so an
    interrupt finds a job not begun or ended, and no thread waits for one that does not come.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.shared = np.zeros(3 * CACHE_LINE // INT64_BYTES, np.int64)
        self._start_threads()

    def _start_threads(self) -> None:
        """Start the other threads; in a process that was forked again, for it has none of its parent's."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self.shared[:] = 0
        self._running = self._closed = False
        self._awake = [threading.Event() for _ in range(1, self.size)]
        self._threads = [
            threading.Thread(target=self._work, args=(index, awake), name=f"team-{index}", daemon=True)
            for index, awake in enumerate(self._awake, 1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(shared, size, *arguments), of a compiled function that runs jobs by
        `run_together`, without the interpreter's lock."""
        if self._process != os.getpid():
            self._start_threads()
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads of this process have ended: the interpreter shuts down")
            try:
                self._running = True
                for awake in self._awake:
                    awake.set()
                return function(self.shared, self.size, *arguments)
            finally:
                self._running = False

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
        begun = 0
        while not self._closed:
            begun = self._take_part(index, begun)
            if not self._running:
                awake.wait()
                awake.clear()

    def _take_part(self, index: int, begun: int) -> int:
        try:
            return _take_part(self.shared, index, begun, SPINS_BEFORE_SLEEP)
        except BaseException:  # the others would wait for this thread forever
            traceback.print_exc()
            os.abort()


@cache
def team(size: int) -> Team:
    """Return this process's one team of a size."""
    made = Team(size)
    atexit.register(made.close)
    return made
