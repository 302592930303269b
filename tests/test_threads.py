"""The threads of the compiled step: barriers, counters of work, and an end with their caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import chain

import numpy as np
import pytest
from numba import njit
from numba.core.errors import TypingError

from engine.backends.cpu import threads
from engine.backends.cpu.jit import part
from engine.backends.cpu.threads import (
    Team,
    atomic_load,
    barrier,
    claim_first,
    claim_unit,
    fetch_add,
    job_of,
    run_together,
)
from engine.backends.cpu.vector_math import address


@part()
def count_up(index, size, counts, taken, found, rounds):
    """Threads that meet after each round find all that the others have done."""
    for done in range(rounds):
        taken[index, fetch_add(address(counts) + 8)] += 1
        barrier(address(counts), size * (2 * done + 1))
        if taken[:, : size * (done + 1)].sum() == size * (done + 1):
            found[index] += 1
        barrier(address(counts), size * (2 * done + 2))


@njit(nogil=True)
def count_together(shared, size, *arguments):
    run_together(shared, size, job_of(count_up, arguments))


def counted(team: Team, rounds: int = 200, run=count_together) -> bool:
    """Run a job whose threads take each number once; return whether each found all."""
    counts, taken = np.zeros(2, np.int64), np.zeros((team.size, team.size * rounds), np.int64)
    found = np.zeros(team.size, np.int64)
    team.run(run, counts, taken, found, rounds)
    assert (taken.sum(0) == 1).all()
    return bool((found == rounds).all())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_threads_meet_and_take_each_number_once(size):
    team = Team(size)
    for pause in (0, 0, 0.1, 0):  # awake and asleep
        time.sleep(pause)
        assert counted(team)


@part()
def claim_all(index, size, counters, units, slow, order):
    """Write down which units a thread claims, in order; a slow last one claims no more than one."""
    at, unit = 0, claim_first(address(counters), units, index, size)
    while unit < units:
        order[index, at] = unit
        at += 1
        if slow and index == size - 1:
            break
        unit = claim_unit(address(counters), units, index, size)


@njit(nogil=True)
def claim_together(shared, size, *arguments):
    run_together(shared, size, job_of(claim_all, arguments))


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("size", "units"), [(1, 5), (2, 7), (3, 100), (4, 2)])
def test_each_unit_is_claimed_once_a_share_in_order_and_what_is_left_by_others(size, units, slow):
    team, order = Team(size), np.full((size, units + 1), -1)
    team.run(claim_together, np.zeros(size, np.int64), units, slow, order)
    claimed = [[unit for unit in row if unit >= 0] for row in order.tolist()]
    assert sorted(chain(*claimed)) == list(range(units)) or (slow and size == 1)
    for index, mine in enumerate(claimed):
        share = range(units * index // size, units * (index + 1) // size)
        before = [unit for unit in mine if unit in share]
        assert mine[: len(before)] == before == sorted(before)
        assert not slow or index < size - 1 or len(mine) <= 1
        assert mine[:1] == list(share[:1]) or not share, "nobody else has it"


def test_a_team_that_is_closed_has_no_threads_and_runs_nothing():
    team = Team(3)
    assert counted(team)
    team.close()
    assert not any(thread.is_alive() for thread in team._threads)
    with pytest.raises(RuntimeError, match="have ended"):
        team.run(count_together)
    team.close()


def test_no_thread_is_left_when_the_interpreter_shuts_down():
    """One that comes out of compiled code then aborts the process, one time in three."""
    code = """
import atexit, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # runs last
from engine.backends.cpu.threads import team
team(3)
print(threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3\n['MainThread']\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system can't fork")
def test_a_team_works_on_in_a_process_that_was_forked():
    """In which none of its threads is, and its lock may be held by one that is not."""
    code = """
import os
from engine import Engine, EngineConfig, SamplingParams, load
import engine.backends.cpu.threads as threads
made = Engine(load("random:tiny-llama"), EngineConfig(kv_memory=2**20))
made.runner.backend.use(3)
ask = lambda: made.generate([[5, 6, 7]], SamplingParams(max_new_tokens=4), progress=False)[0].token_ids
before = ask()
with threads.team(3)._lock:
    child = os.fork()
    if child == 0:
        assert ask() == before
        raise SystemExit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert ask() == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_the_caller_raises_is_raised_and_the_team_goes_on():
    """As when the function can't be compiled for what it is given."""
    team = Team(3)
    with pytest.raises(TypingError):
        team.run(count_together, "counts")
    assert counted(team)


def test_others_wait_for_a_caller_that_takes_its_time():
    """As it does when it compiles."""

    def late(*arguments):
        time.sleep(0.3)
        count_together(*arguments)

    assert counted(Team(3), run=late)


INSIDE, KEPT, DONE = range(3)  # of int64: the caller is in compiled code; the lock is kept; a job has ended
MOST_LOADS = 10**10  # some seconds


@njit
def keep_lock(state):
    """Keep the interpreter's lock until a job has ended, or for some time; return whether it has."""
    state[KEPT], loads = 1, 0
    while loads < MOST_LOADS and not atomic_load(address(state) + 8 * DONE):
        loads += 1
    return loads < MOST_LOADS


@njit(nogil=True)
def count_meanwhile(shared, size, state, *arguments):
    run_together(shared, size, job_of(count_up, arguments))
    state[INSIDE] = 1
    while not atomic_load(address(state) + 8 * KEPT):
        pass
    run_together(shared, size, job_of(count_up, arguments))
    state[DONE] = 1


def test_a_job_needs_no_interpreters_lock(monkeypatch):
    """Where it did, whatever else the process does in Python would keep all its threads waiting."""
    monkeypatch.setattr(threads, "SPINS_BEFORE_SLEEP", 10**6)
    team, state, found = Team(2), np.zeros(3, np.int64), []
    keep_lock(np.array([0, 0, 1]))  # compiles it

    def keep() -> None:
        while not state[INSIDE]:
            time.sleep(1e-4)
        found.append(keep_lock(state))

    other = threading.Thread(target=keep, daemon=True)
    other.start()
    taken, rounds_found = np.zeros((2, 2), np.int64), np.zeros(2, np.int64)
    team.run(count_meanwhile, state, np.zeros(2, np.int64), taken, rounds_found, 0)
    other.join()
    assert found == [True]
    team.close()


@pytest.mark.slow
def test_a_thread_that_fails_ends_the_process_rather_than_have_others_wait_forever():
    code = """
import engine.backends.cpu.threads as threads
from tests.test_threads import counted
threads._take_part = lambda *arguments: [][0]
counted(threads.Team(2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "IndexError" in done.stderr


@pytest.mark.slow
def test_an_interrupt_waits_for_the_job_and_harms_no_later_one():
    team = Team(2)

    def forever() -> None:
        while True:
            counted(team, 2000)

    for hurry in range(20):  # before a job begins, while it runs, or when it has ended
        threading.Timer(0.05 + hurry * 1e-3, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            forever()
        assert counted(team)
