"""The threads of the compiled step: barriers, counters of work, and an end with their caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from itertools import chain

import numpy as np
import pytest
import torch
from numba import njit

from engine.backends.cpu.threads import Team, barrier, begin_together, claim_first, claim_unit, fetch_add
from engine.backends.cpu.vector_math import address


@njit(nogil=True)
def count_up(index, size, start, counts, taken, rounds):
    """Threads that meet after each round find all that the others have done."""
    begin_together(index, start)
    found = True
    for done in range(rounds):
        taken[index, fetch_add(address(counts) + 8)] += 1
        barrier(address(counts), size * (2 * done + 1))
        found = found and taken[:, : size * (done + 1)].sum() == size * (done + 1)
        barrier(address(counts), size * (2 * done + 2))
    return found


def counted(team: Team, rounds: int = 200, before=lambda index: None) -> list[bool]:
    """Run a job whose threads take each number once; return the finding of each."""
    counts, taken, found = np.zeros(2, np.int64), np.zeros((team.size, team.size * rounds), np.int64), []

    def job(index: int) -> None:
        before(index)
        found.append(count_up(index, team.size, team.start, counts, taken, rounds))

    team.run(job)
    while len(found) < team.size:  # a thread has left the job, but may not have said so
        time.sleep(0.001)
    assert (taken.sum(0) == 1).all()
    return found


@pytest.mark.parametrize("size", [1, 2, 5])
def test_threads_meet_and_take_each_number_once(size):
    team = Team(size)
    for pause in (0, 0, 0.1, 0):  # awake and asleep
        time.sleep(pause)
        assert counted(team) == [True] * size


@njit(nogil=True)
def claim_all(index, size, start, counters, units, slow, order):
    """Write down which units a thread claims, in order; a slow last one claims no more than one."""
    begin_together(index, start)
    at, unit = 0, claim_first(address(counters), units, index, size)
    while unit < units:
        order[index, at] = unit
        at += 1
        if slow and index == size - 1:
            break
        unit = claim_unit(address(counters), units, index, size)
    barrier(address(counters) + 8 * size, size)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("size", "units"), [(1, 5), (2, 7), (3, 100), (4, 2)])
def test_each_unit_is_claimed_once_a_share_in_order_and_what_is_left_by_others(size, units, slow):
    team, order = Team(size), np.full((size, units + 1), -1)
    counters = np.zeros(size + 1, np.int64)
    team.run(lambda index: claim_all(index, size, team.start, counters, units, slow, order))
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
    assert counted(team) == [True] * 3
    team.close()
    assert not any(thread.is_alive() for thread in team._threads)
    with pytest.raises(RuntimeError, match="have ended"):
        team.run(lambda index: None)
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
    team = Team(3)

    def fail(index: int) -> None:
        raise ValueError(f"in thread {index}")

    with pytest.raises(ValueError, match="in thread 0"):
        team.run(fail)
    assert counted(team) == [True] * 3


def test_nothing_of_a_job_is_held_when_it_has_ended():
    """It may hold a model's weights."""
    team, weights = Team(2), torch.zeros(1)
    held = weakref.ref(weights)
    counted(team, before=lambda index, weights=weights: None)
    del weights
    for _ in range(1000):  # a thread has left the job, but may not have let go of it
        if held() is None:
            return
        time.sleep(0.01)
    pytest.fail("the last job is still held")


def test_others_wait_for_a_caller_that_takes_its_time():
    """As it does when it compiles."""
    assert counted(Team(3), before=lambda index: time.sleep(0 if index else 0.3)) == [True] * 3


@pytest.mark.slow
def test_a_thread_that_fails_ends_the_process_rather_than_have_others_wait_forever():
    code = """
from tests.test_threads import Team, counted
counted(Team(2), before=lambda index: [][index - 1] if index else None)
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
        assert counted(team) == [True] * 2
