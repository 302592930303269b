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
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.ab import turn_agent
from perf.ab.groups import ORDERS, SIDES, Group, Turn
from perf.errors import GateError, uninterrupted
from perf.gate.pytest_process import failure, has_plugin, pytest_command
from perf.gate.saved_runs import Run, load

SAVED = "saved.json"
AGENT = "perf_turn_agent"  # what the copy of the plugin is called
NOTHING_LEFT = 5  # pytest's exit code where no test is run
LISTEN_S = 1.0  # between looks whether a process that tells nothing is still there
SINGLE = 1.2  # processors that a process uses at most to count as one that needs a single one


def turns_command(args: Sequence[str], tree: Path, folder: Path) -> list[str]:
    """The command of a pytest that takes turns in `tree`: it ends with the first failure, keeps its tests in
    their order, and no limit of time stops it while the other side measures."""
    own = [f"--benchmark-json={folder / SAVED}", "-x"]
    own += ["-p", "no:randomly"] if has_plugin("randomly", args) else []
    own += ["--timeout=0"] if has_plugin("timeout", args) else []
    return pytest_command(args, tree, *own)


@dataclass(frozen=True)
class Side:
    """What a process of one side is started with. name: for messages. folder: for its files. served: whether
    it only asks a server, which has processors of its own choice; two servers that compute at once can take
    many times as long as one after the other, so that only one side at a time proves its tokens."""

    name: str
    command: Sequence[str]
    tree: Path
    env: Mapping[str, str]
    folder: Path
    served: bool = False

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
                stdout=log, stderr=subprocess.STDOUT, pass_fds=(orders[0], told[1]), start_new_session=True,
            )  # fmt: skip
        os.close(orders[0])
        os.close(told[1])
        self._orders = os.fdopen(orders[1], "w", encoding="utf-8")
        self._told, self._heard = told[0], bytearray()

    def hear(self) -> dict[str, Any]:
        """The next thing that it tells; `{"kind": "gone"}` when it has ended, whatever its children do.

        One that asks whether it may begin may, as soon as it is listened to.
        """
        while (told := self._hear())["kind"] == "begin":
            self.order()
        return told

    def _hear(self) -> dict[str, Any]:
        while (end := self._heard.find(b"\n")) < 0:
            if not select.select([self._told], [], [], LISTEN_S)[0]:
                if self.process.poll() is not None:
                    return {"kind": "gone"}
                continue
            new = os.read(self._told, 1 << 20)
            if not new:
                return {"kind": "gone"}
            self._heard += new
        line = self._heard[:end]
        del self._heard[: end + 1]
        return dict(json.loads(line))

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
        if code and code != NOTHING_LEFT:
            raise self.failed(code=code)
        return load(saved) if saved.is_file() and saved.stat().st_size else None

    def failed(self, what: str = "", code: int = 0) -> GateError:
        """The error of a process that did not do what it should."""
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return failure(self.side.name, self.side.command, code, output, what)

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Put away what is left of a process that has ended."""
        self.process.wait()
        with suppress(BrokenPipeError):  # what was still to be told has nobody to hear it
            self._orders.close()
        os.close(self._told)


class Pair:
    """Base and head, both live.

    common: the benchmarks that both have collected, in their order. replayed: those that are timed otherwise,
    so that they take no turns.
    """

    def __init__(self, processes: Sequence[Process], rng: random.Random) -> None:
        self.processes, self._rng = processes, rng
        self._items: list[list[str]] = []
        self.replayed: set[str] = set()
        for process in processes:
            told = process.hear()
            if told["kind"] == "gone":
                process.conclude()
                raise process.failed()
            self._items.append(told["items"])
        base, head = self._items
        both = [[item for item in own if item in set(other)] for own, other in ((base, head), (head, base))]
        if both[0] != both[1]:
            here = next((a, b) for a, b in zip(*both, strict=True) if a != b)
            way_out = "have both in one order (-p no:randomly), or measure them with --interleave blocks"
            raise GateError(
                f"head runs {here[1]} where base runs {here[0]}, so they cannot take turns: {way_out}"
            )
        self.common = both[0]

    def run(
        self, wanted: Collection[str], measure: Callable[[str, Meeting], None], alone: bool = False
    ) -> None:
        """Go through those `wanted` of the common benchmarks; call `measure` at each that both have come to.

        With `alone`, benchmarks of one side alone run once, so that they are among what is saved, and so do
        tests that measure nothing.
        """
        common = set(self.common)
        for process, items in zip(self.processes, self._items, strict=True):
            own = [item for item in items if item in wanted or (alone and item not in common)]
            process.order(run=own, others=alone, asks=process.side.served)
        for item in [*(item for item in self.common if item in wanted), None]:
            told = [self._come(process, item) for process in self.processes]
            if item is None:
                return
            if all(one["kind"] == "at" for one in told):
                measure(item, Meeting(self.processes, told[1].get("gate"), self._rng))
            self._end(item, list(zip(self.processes, told, strict=True)))

    def _come(self, process: Process, item: str | None) -> Mapping[str, Any]:
        """Let a process come to an item, past those that it alone has, or to its end."""
        while (told := process.hear())["kind"] != "gone":
            if told["item"] == item:
                return told
            self._end(told["item"], [(process, told)])
        if item is not None:
            process.conclude()
            raise process.failed(f"pytest ended before {item}")
        return told

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
            if last["replayed"]:
                self.replayed.add(item)

    def conclude(self) -> list[Run | None]:
        """Wait for the ends of both; what they saved."""
        return [process.conclude() for process in self.processes]


class Meeting:
    """Both processes at the same benchmark. gate: the tolerances that head has for it, as JSON text."""

    def __init__(self, processes: Sequence[Process], gate: str | None, rng: random.Random) -> None:
        self.processes, self.gate, self._rng = processes, gate, rng
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._groups = 0

    def warm_up(self, seconds: float) -> None:
        """A turn of each side that is not kept.

        Processes that keep no more than one processor busy and have no children are pinned from now on, both
        to the same one, and to the next in each group: two processors of a shared machine can differ for
        seconds by more than code does.
        """
        turns = [self._turn(side, seconds, None, None) for side in SIDES]
        served = any(process.side.served for process in self.processes)
        if served or any(turn.children or turn.cpu_s > SINGLE * turn.seconds for turn in turns):
            self._cpus = []

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
        return Turn.of(told, process.side.served)


@contextmanager
def pair(sides: Sequence[Side], rng: random.Random) -> Iterator[Pair]:
    """Start both processes at once; nothing of them is left afterwards."""
    processes: list[Process] = []
    try:
        for side in sides:
            processes.append(Process(side))
        yield Pair(processes, rng)
    finally:
        with uninterrupted():
            for process in processes:
                process.kill()
            for process in processes:
                process.close()


def clock() -> float:
    """Seconds by the clock of the coordinator."""
    return time.monotonic()
