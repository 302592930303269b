"""Saved pytest-benchmark runs, read and checked: a JSON file becomes a Run, or an error that says why.

Which files are meant is decided in perf/gate/storage.py, what an entry of one says in perf/gate/entries.py,
and how sessions that were saved under one name become one Run in perf/gate/merging.py. It judges nothing and
imports neither torch nor pytest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.errors import GateError
from perf.gate import entries, merging
from perf.gate.entries import Benchmark
from perf.gate.storage import STORAGE, resolve

# This project's own benchmarks were in perf/ itself: runs of then have them there, and still compare.
LISTED = 5  # names of files in a note
SHORT = 9  # hex digits of a commit that people are shown
UNVERSIONED = "unversioned"  # what pytest-benchmark calls the commit of a folder that has none
MOVED = re.compile(
    r"perf/(test_(?:batch_size|load|memory|peers|policies|roofline|scale|startup)\.py::"
    r"test_(?:batch_size|open_load|prefix_reuse|memory|peers|policy|prefill|decode|scale|startup)\[.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A saved run: a session, or several of one commit that were saved under one name.

    name: what it was saved as. path: its file, of several sessions that of the last. commit, machine: as
    pytest-benchmark recorded them. notes: how it was found, where a reader should know. earlier: the files of
    its other sessions, oldest first.
    """

    name: str
    path: Path
    machine: Mapping[str, Any]
    commit: Mapping[str, Any]
    datetime: str
    benchmarks: Mapping[str, Benchmark]
    notes: tuple[str, ...] = ()
    earlier: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file of each session, oldest first."""
        return (*self.earlier, self.path)

    @property
    def sessions(self) -> int:
        return len(self.paths)


def load(which: str | Path, storage: Path | str = STORAGE) -> Run:
    """Read and check a saved run; `which` and `storage` are as for `perf.gate.storage.resolve`.

    A name means all sessions saved under it of the commit that the last one is of; notes name the others.

    Raises:
        GateError: if it cannot be found or read, is not a pytest-benchmark run, or has no benchmarks in it.
    """
    found = resolve(which, storage)
    return with_earlier(read(found.path), found.earlier)


def read(path: Path) -> Run:
    """Read and check the session in a file; raises as `load` does."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        where = str(path)
        raise GateError(f"run {where!r} cannot be read as JSON ({error}): measure it again") from None
    return parse(data, path)


def with_earlier(last: Run, earlier: Sequence[Path]) -> Run:
    """A session put together with those of the same commit among earlier ones of its name."""
    same, others, notes = [last], list[str](), list[str]()
    for path in reversed(earlier):
        try:
            session = read(path)
        except GateError as error:
            notes.append(f"left out of {last.name!r}: {error}")
            continue
        if is_same_code(session, last):
            same.insert(0, session)
        else:
            others.insert(0, path.stem)
    if others:
        listed = ", ".join(others[-LISTED:]) + (" and older ones" if len(others) > LISTED else "")
        count = f"{len(others)} of {len(earlier) + 1} runs saved as {last.name!r}"
        notes.append(f"{count} are of other commits, and left out: {listed}")
    if len(same) > 1 and last.commit.get("dirty"):
        count = f"{len(same)} sessions of {last.name!r} have uncommitted changes, taken for the same"
        notes.append(f"{count}: {last.path.stem} is the last one alone")
    return replace(merge(same), notes=tuple(notes))


def merge(sessions: Sequence[Run], unit: str = "sessions") -> Run:
    """One run of sessions that measured the same code, oldest first; `unit` is what they are called."""
    *others, last = sessions
    if not others:
        return last
    names = dict.fromkeys(name for session in reversed(sessions) for name in session.benchmarks)
    found = {name: [session.benchmarks.get(name) for session in sessions] for name in names}
    benchmarks = {name: merging.merge(some, unit) for name, some in found.items()}
    return replace(last, benchmarks=benchmarks, earlier=tuple(session.path for session in others))


def shared(base: Run, head: Run) -> Path | None:
    """The file of a session that both runs have, or None: a session always equals itself."""
    both = (path for path in head.paths if any(path.samefile(other) for other in base.paths))
    return next(both, None)


def short_commit(run: Run, absent: str) -> str:
    """Return the commit that a run measured, as people are shown it, `absent` for a run of none; `+` marks
    uncommitted changes."""
    commit = str(run.commit.get("id") or UNVERSIONED)
    if commit == UNVERSIONED:
        return absent
    return f"{commit[:SHORT]}{'+' if run.commit.get('dirty') else ''}"


def is_same_code(one: Run, other: Run) -> bool:
    """Return whether two sessions measured one commit, or both none, as far as they recorded it."""
    return all(one.commit.get(key) == other.commit.get(key) for key in ("id", "dirty"))


def parse(data: Any, path: Path | str) -> Run:
    """A Run from pytest-benchmark's own dict; raises as `load` does."""
    path = Path(path)
    found = data.get("benchmarks") if isinstance(data, dict) else None
    if not isinstance(found, list):
        raise GateError(f"run {str(path)!r} is not a pytest-benchmark run: it has no list 'benchmarks'")
    if not found:
        raise GateError(
            f"run {str(path)!r} is empty: every benchmark was skipped, deselected or ended with an error; "
            "look at its pytest output (-rs says why a test was skipped)"
        )
    benchmarks: dict[str, Benchmark] = {}
    machine = entries.mapping(data.get("machine_info"))
    for entry in found:
        name = entry.get("fullname") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise GateError(f"run {str(path)!r} has a benchmark without a fullname: measure it again")
        name = f"perf/benchmarks/{moved[1]}" if (moved := MOVED.fullmatch(name)) else name
        if name in benchmarks:
            raise GateError(f"run {str(path)!r} has {name} twice: measure it once a run")
        benchmarks[name] = entries.read(name, entry, machine)
    stem = path.stem.split("_", 1)
    name = stem[1] if len(stem) == 2 and stem[0].isdigit() else path.stem
    commit = entries.mapping(data.get("commit_info"))
    return Run(name, path, machine, commit, str(data.get("datetime", "")), benchmarks)
