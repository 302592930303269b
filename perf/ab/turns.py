"""Two live pytest processes, base and head, that take turns: rounds of one alternate with rounds of the
other.

Each has imported everything, built its model and proven its tokens before the first turn, and sleeps while
the other measures. Their start-up is paid once a pair. This is the coordinator's side of the protocol in
perf/ab/turn_agent.py; what is worth measuring for how long is its caller's business.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.ab import turn_agent
from perf.ab.groups import ORDERS, Group, Turn
from perf.errors import GateError
from perf.gate.pytest_process import failure
from perf.gate.saved_runs import Run, load

SAVED = "saved.json"
AGENT = "perf_turn_agent"  # what the copy of the plugin is called
SINGLE = 1.2  # processors that a process uses at most to count as one that needs a single one
SIDES = (0, 1)


@dataclass(frozen=True)
class Side:
    """What a process of one side is started with. name: for messages. folder: for its files."""

    name: str
    command: Sequence[str]
    tree: Path
    env: Mapping[str, str]
    folder: Path

    @property
    def saved(self) -> Path:
        return self.folder / SAVED


class Process:
    """A live pytest that takes turns. It is told what to do, and asked; it never times by itself."""

    def __init__(self, side: Side) -> None:
        self.side = side
        shutil.copyfile(turn_agent.__file__, side.folder / f"{AGENT}.py")
        self.log = side.folder / "log"
        orders, told = os.pipe(), os.pipe()
        paths = os.pathsep.join(filter(None, (str(side.folder), side.env.get("PYTHONPATH"))))
        env = {**side.env, "PYTHONPATH": paths, turn_agent.LINK: f"{orders[0]},{told[1]}"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*side.command, "-p", AGENT], cwd=side.tree, env=env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, pass_fds=(orders[0], told[1]),
            )  # fmt: skip
        os.close(orders[0])
        os.close(told[1])
        self._orders = os.fdopen(orders[1], "w", encoding="utf-8")
        self._told = os.fdopen(told[0], encoding="utf-8")

    def hear(self) -> dict[str, Any]:
        """The next thing that it tells; `{"kind": "gone"}` when it has ended."""
        line = self._told.readline()
        return json.loads(line) if line.endswith("\n") else {"kind": "gone"}

    def order(self, **what: Any) -> None:
        """Answer it. One that has ended is told nothing; it is heard to be gone."""
        with suppress(BrokenPipeError):
            print(json.dumps(what), file=self._orders, flush=True)

    def conclude(self) -> Run | None:
        """Wait for its end; the run that it saved, None if it had nothing to measure.

        Raises:
            GateError: with the end of its output, if pytest failed.
        """
        with suppress(BrokenPipeError):
            self._orders.close()  # so that one that still waits for an order ends
        code = self.process.wait()
        saved = self.side.saved
        if code:
            raise self.failed(code=code)
        return load(saved) if saved.is_file() and saved.stat().st_size else None

    def failed(self, what: str = "", code: int = 0) -> GateError:
        """The error of a process that did not do what it should."""
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return failure(self.side.name, self.side.command, code, output, what)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self._orders, self._told):
            with suppress(BrokenPipeError):  # what was still to be told has nobody to hear it
                pipe.close()


class Pair:
    """Base and head, both live. common: the benchmarks that both have collected, in their order."""

    def __init__(self, processes: Sequence[Process], rng: random.Random) -> None:
        self.processes, self._rng = processes, rng
        items: list[list[str]] = []
        for process in processes:
            told = process.hear()
            if told["kind"] == "gone":
                process.conclude()
                raise process.failed()
            items.append(told["items"])
        both = [[item for item in own if item in set(other)] for own, other in (items, items[::-1])]
        if both[0] != both[1]:
            here = next((a, b) for a, b in zip(*both, strict=True) if a != b)
            way_out = "measure them with --interleave blocks"
            raise GateError(
                f"head runs {here[1]} where base runs {here[0]}, so they cannot take turns: {way_out}"
            )
        self.common = both[0]

    def run(
        self, wanted: Callable[[str], bool], measure: Callable[[str, Meeting], None], alone: bool = False
    ) -> None:
        """Go through the tests of both, and call `measure` at each benchmark that both have come to.

        Those that are not `wanted` are left out. With `alone`, a benchmark of one side alone runs once, so
        that it is among what is saved.
        """
        for item in [*self.common, None]:
            for side in SIDES:
                self._bring(side, item, alone)
            if item is None:
                return
            use = wanted(item)
            for process in self.processes:
                process.order(run=use)
            told = [process.hear() for process in self.processes] if use else []
            if told and all(one["kind"] == "at" for one in told):
                measure(item, Meeting(self.processes, told[0].get("gate"), told[1].get("gate"), self._rng))
            self._end(item, list(zip(self.processes, told, strict=False)))

    def _bring(self, side: int, item: str | None, alone: bool) -> None:
        """Bring one side to an item, past those that it alone has, or to its end."""
        process = self.processes[side]
        while (told := process.hear())["kind"] != "gone":
            if told["item"] == item:
                return
            process.order(run=alone)
            if alone:
                self._end(told["item"], [(process, process.hear())])
        if item is not None:
            process.conclude()
            raise process.failed(f"pytest ended before {item}")

    def _end(self, item: str, told: Sequence[tuple[Process, Mapping[str, Any]]]) -> None:
        """Let processes go on from a benchmark that they have come to, or past, all at once."""
        for process, one in told:
            if one["kind"] == "at":
                process.order(seconds=None)
        for process, one in told:
            last = process.hear() if one["kind"] == "at" else one
            if last["kind"] != "end":
                process.conclude()
                raise process.failed(f"pytest ended in {item}")

    def conclude(self) -> list[Run | None]:
        """Wait for the ends of both; what they saved."""
        return [process.conclude() for process in self.processes]


class Meeting:
    """Both processes at the same benchmark. gate: the tolerances that each has for it, as JSON text."""

    def __init__(
        self, processes: Sequence[Process], base: str | None, head: str | None, rng: random.Random
    ) -> None:
        self.processes, self.gates, self._rng = processes, (base, head), rng
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._groups = 0

    def warm_up(self, seconds: float) -> float:
        """A turn of each side that is not kept. Return how long a turn takes.

        Processes that keep no more than one processor busy are pinned from now on, both to the same one, and
        to the next in each group: two processors of a shared machine can differ for seconds by more than code
        does.
        """
        turns = [self._turn(side, seconds, None, None) for side in SIDES]
        if any(turn.cpu_s > SINGLE * turn.seconds for turn in turns):
            self._cpus = []
        return max(turn.seconds for turn in turns)

    def group(self, seconds: float, slowdown: str | None = None) -> Group:
        """Four turns of so many seconds each, in an order that is drawn; head is slowed down if asked."""
        order = self._rng.choice(ORDERS)
        cpu = self._cpus[self._groups % len(self._cpus)] if self._cpus else None
        self._groups += 1
        return Group(
            order, tuple(self._turn(side, seconds, cpu, slowdown if side else None) for side in order)
        )

    def _turn(self, side: int, seconds: float, cpu: int | None, slowdown: str | None) -> Turn:
        process = self.processes[side]
        process.order(seconds=seconds, cpu=cpu, slowdown=slowdown)
        told = process.hear()
        if told["kind"] != "turn":
            process.conclude()
            raise process.failed("a round failed")
        return Turn.of(told)


@contextmanager
def pair(sides: Sequence[Side], rng: random.Random) -> Iterator[Pair]:
    """Start both processes at once; nothing of them is left afterwards."""
    processes: list[Process] = []
    try:
        for side in sides:
            processes.append(Process(side))
        yield Pair(processes, rng)
    finally:
        for process in processes:
            process.end()


def clock() -> float:
    """Seconds by the clock of the coordinator."""
    return time.monotonic()
