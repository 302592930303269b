"""Pytest plugin of a process that takes turns with another: rounds are timed when its coordinator says so.

A copy of this file is loaded by `-p` into each side of an A/B, so that every revision speaks the
coordinator's language, whatever perf it has itself: it imports pytest, pytest-benchmark and the standard
library. Coordinator and process exchange JSON objects, a line each, over two file descriptors that the
environment names; "kind" says which. The process tells, the coordinator (perf/ab/turns.py) answers:

    {"kind": "collected", "items": [node ids that take a benchmark]}         {"run": [ids], "others": bool,
                                                                              "asks": bool}
    {"kind": "begin", "item": id}, before it is proven, if it "asks"         {}, once it may
    {"kind": "at", "item": id, "gate": its tolerances}, a benchmark's begin  an order, see below
    {"kind": "turn", "samples": [...], "seconds": s, ...}                    the next order
    {"kind": "end", "item": id, "replayed": bool}                            no answer

An order is {"seconds": s, "cpu": number or null, "slowdown": text or null}, rounds for at least so many
seconds, or {"seconds": null}: the benchmark is over. A round's sample is what the benchmark's teardown
returns, if its attribute `tells_sample` says so, else its time.
"""

from __future__ import annotations

import atexit
import gc
import glob
import importlib
import json
import math
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAME = "dynamic-batch-turns"
LINK = "PERF_TURNS"  # "3,4": the descriptors to read from and to write to
REPLAYED = "replayed"  # attribute of a target whose rounds were timed before and are only told again
TELLS = "tells_sample"  # attribute of a teardown that returns its round's sample
GPU_SHARE = 0.45  # of the memory of each GPU, for either side
MOST_LOOPS = 1_000_000  # of a target timed together
CANARY = range(8000)  # a third of a millisecond of Python
ALL_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
Spend = Callable[[float], list[dict[str, Any]]]  # time rounds for so many seconds; gives a sample each


class Link:
    """The coordinator, as the process sees it."""

    def __init__(self, descriptors: str) -> None:
        ours, theirs = map(int, descriptors.split(","))
        for descriptor in (ours, theirs):
            os.set_inheritable(descriptor, False)
        self._orders = os.fdopen(ours, encoding="utf-8")
        self._told = os.fdopen(theirs, "w", encoding="utf-8")

    def tell(self, kind: str, **what: Any) -> None:
        print(json.dumps({"kind": kind, **what}), file=self._told, flush=True)

    def ask(self, kind: str, **what: Any) -> dict[str, Any]:
        """Tell, and wait for the answer. Raises KeyboardInterrupt if the coordinator is gone."""
        self.tell(kind, **what)
        line = self._orders.readline()
        if not line:
            raise KeyboardInterrupt("the coordinator has gone")
        return dict(json.loads(line))


class Agent:
    """The plugin."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.item: pytest.Item | None = None
        self.replayed = self.asks = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tell what there is, and leave out what the coordinator has no use for."""
        order = self.link.ask("collected", items=[item.nodeid for item in session.items if _measures(item)])
        wanted, self.asks = set(order["run"]), order["asks"]
        session.items[:] = [
            item for item in session.items if (item.nodeid in wanted if _measures(item) else order["others"])
        ]
        gc.collect()
        gc.freeze()  # what was imported: to look through it takes a fifth of a second each time

    def pytest_runtest_logstart(self) -> None:
        _share_gpu()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.item, self.replayed = item, False
        if self.asks and _measures(item):
            self.link.ask("begin", item=item.nodeid)
        return (yield)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.item is not None and _measures(self.item):
            self.link.tell("end", item=nodeid, replayed=self.replayed)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """Stand for what takes seconds to find out: the other side has the same."""
        about = {"machine": platform.machine(), "system": platform.system()}
        return {**about, "python_version": platform.python_version(), "cpu": {"brand_raw": _brand()}}

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Any:
        """End at once where all went well and is saved: what would follow costs seconds of the budget."""
        result = yield
        if session.exitstatus == pytest.ExitCode.OK:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(session.exitstatus))
        return result

    def take_turns(self, spend: Spend) -> None:
        """Time rounds whenever it is this process's turn, until the coordinator has enough.

        A benchmark that was not announced, for its test asked for the fixture as it ran, has no turns.
        """
        if self.item is None or not _measures(self.item):
            return
        order = self.link.ask("at", item=self.item.nodeid, gate=_gate(self.item))
        gc.collect()
        gc.freeze()  # else collecting what was made since takes longer than a round
        try:
            while order["seconds"] is not None:
                order = self.link.ask("turn", **_turn(order, spend))
        finally:
            gc.unfreeze()
            _pin(None)


def pytest_configure(config: pytest.Config) -> None:
    descriptors = os.environ.pop(LINK, None)
    if descriptors is not None:
        agent = Agent(Link(descriptors))
        config.pluginmanager.register(agent, NAME)
        _take_over(agent)


def _take_over(agent: Agent) -> None:
    """Have pytest-benchmark run a first round by itself, and all others in turn."""
    from pytest_benchmark.fixture import BenchmarkFixture, PauseInstrumentation

    fixture: Any = BenchmarkFixture
    call, pedantic = fixture.__call__, fixture.pedantic

    def timed(self: Any, target: Any, args: Any, kwargs: Any, loops: int) -> float:
        """Run so many times, timed together; add a round to the fixture's, and give the seconds of one."""
        with PauseInstrumentation():
            seconds: float = self._make_runner(target, args, kwargs)(range(loops))
        self.stats.update(seconds / loops * self.stats.iterations)
        return seconds / loops

    def in_a_row(self: Any, target: Any, args: Any, kwargs: Any) -> Spend:
        """Turns of a target that needs nothing done between its rounds."""
        one = [0.0]

        def spend(seconds: float) -> list[dict[str, Any]]:
            loops = min(max(1, math.ceil(seconds / one[0])), MOST_LOOPS) if one[0] else 1
            one[0] = timed(self, target, args, kwargs, loops)
            return [{"round_s": one[0]}]

        return spend

    def called(self: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        self._max_time, self._min_rounds, self._precision = 0.0, 1, None  # of the first: others come in turn
        result = call(self, target, *args, **kwargs)
        if not self.disabled:
            agent.take_turns(in_a_row(self, target, args, kwargs))
        return result

    def called_pedantically(
        self: Any, target: Any, args: Any = (), kwargs: Any = None, setup: Any = None, teardown: Any = None,
        rounds: int = 1, warmup_rounds: int = 0, iterations: int = 1,
    ) -> Any:  # fmt: skip
        replayed = agent.replayed = getattr(target, REPLAYED, False)
        tells = getattr(teardown, TELLS, False)
        if not (replayed or tells) and "perf_case" in getattr(agent.item, "fixturenames", ()):
            pytest.fail("its perf is too old to tell round by round: give --interleave blocks", pytrace=False)
        result = pedantic(
            self, target, args, kwargs, setup, teardown,
            rounds if replayed else min(rounds, 1), warmup_rounds, iterations,
        )  # fmt: skip

        def spend(seconds: float) -> list[dict[str, Any]]:
            samples: list[dict[str, Any]] = []
            until = time.perf_counter() + seconds
            while not samples or time.perf_counter() < until:
                given, named = (setup() if setup else None) or (args, kwargs or {})
                one = timed(self, target, given, named, iterations)
                told = teardown(*given, **named) if teardown else None
                samples.append(told if tells and told is not None else {"round_s": one})
            return samples

        if not self.disabled and not replayed:
            agent.take_turns(spend if setup or teardown else in_a_row(self, target, args, kwargs or {}))
        return result

    fixture.__call__, fixture.pedantic = called, called_pedantically


def _turn(order: dict[str, Any], spend: Spend) -> dict[str, Any]:
    """Run rounds for a while; tell their samples, and what the machine did meanwhile."""
    _pin(order["cpu"])
    before, stolen, cpu = resource.getrusage(resource.RUSAGE_SELF), _stolen_s(order["cpu"]), _cpu_s()
    began = time.perf_counter()
    first = _canary_s()
    with _slowed(order["slowdown"]):
        samples = spend(order["seconds"])
    last = _canary_s()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "samples": samples,
        "seconds": time.perf_counter() - began,
        "cpu_s": _cpu_s() - cpu,
        "children": order["cpu"] is None and _has_children(),  # else it is known to have none
        "canary_s": [first, last],
        "stolen_s": _stolen_s(order["cpu"]) - stolen,
        "switches": after.ru_nivcsw - before.ru_nivcsw,
        "faults": after.ru_majflt - before.ru_majflt,
    }


def _share_gpu() -> None:
    """Leave the other side its room on each GPU: both see GPU_SHARE of its memory, and get no more.

    Only torch is told, and only where it has been imported. What is free is of this process's own share, so
    that whoever is first has no more than the other.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or hasattr(torch.cuda, "perf_shared"):
        return
    info = torch.cuda.mem_get_info

    def shared(device: Any = None) -> tuple[int, int]:
        total = int(GPU_SHARE * info(device)[1])
        return max(0, total - int(torch.cuda.memory_reserved(device))), total

    for device in range(torch.cuda.device_count()):
        torch.cuda.set_per_process_memory_fraction(GPU_SHARE, device)
    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = shared
    torch.cuda.perf_shared = GPU_SHARE


def _pin(cpu: int | None) -> None:
    """Keep this thread on one processor, or on those that the process began with."""
    if ALL_CPUS:
        os.sched_setaffinity(0, ALL_CPUS if cpu is None else {cpu})


def _canary_s() -> float:
    """The time of a fixed piece of work."""
    started = time.perf_counter()
    for _ in CANARY:
        pass
    return time.perf_counter() - started


def _cpu_s() -> float:
    """Processor time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _has_children() -> bool:
    """Return whether there are processes that this one has started, where the system tells."""
    tasks = glob.glob("/proc/self/task/*/children")
    with suppress(OSError):
        return any(Path(task).read_text(encoding="ascii").strip() for task in tasks)
    return False


def _stolen_s(cpu: int | None) -> float:
    """The time that the hypervisor gave to others: of one processor, or the mean of all; 0 if unknown."""
    with suppress(OSError, IndexError, StopIteration):
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        name = "cpu" if cpu is None else f"cpu{cpu}"
        found = next(line.split() for line in lines if line.startswith(f"{name} "))
        return int(found[8]) / TICKS_PER_S / ((os.cpu_count() or 1) if cpu is None else 1)
    return 0.0


def _brand() -> str | None:
    """The processor's name, as py-cpuinfo finds it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return None


@contextmanager
def _slowed(spec: str | None) -> Iterator[None]:
    """Inject a slowdown, for the gate's self-test."""
    if not spec:
        yield
        return
    with importlib.import_module("perf.measure.inject_slowdown").inject_slowdown(spec):
        yield


def _measures(item: pytest.Item) -> bool:
    return "benchmark" in getattr(item, "fixturenames", ())


def _gate(item: pytest.Item) -> str | None:
    """The test's tolerances as its own perf reads its marks; None without any."""
    if not any(item.iter_markers("perf_gate")) or not item.config.pluginmanager.has_plugin("perf.plugin"):
        return None
    try:
        text: str | None = importlib.import_module("perf.gate.tolerances").of(item)[0]
    except ImportError:
        return None  # of a perf that has them elsewhere; what is saved has them all the same
    return text
