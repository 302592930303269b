"""Saved runs as a report reads them: what cannot be shown is left out and named, and the rest is shown.

The gate reads by perf/gate/saved_runs.py alone, to which a run that is not whole is an error. No exit code
hangs on what is here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.errors import Exit, GateError
from perf.gate.comparison import Comparison
from perf.gate.entries import Benchmark
from perf.gate.metrics import METRICS
from perf.gate.noise import read_noise
from perf.gate.saved_runs import Run, load, parse, shared
from perf.gate.steps import NO_STEPS, Steps, find_steps
from perf.gate.storage import resolve
from perf.gate.verdict import compare_saved
from perf.report.text import FLOAT_MAX
from perf.report.verdicts import named


@dataclass(frozen=True)
class Reading:
    """The runs to report on.

    runs: oldest first, each with the benchmarks that can be shown. comparison: of the runs as they were
    saved, by the gate's own rules; None where one of the two is not whole. left_out: a line for each thing
    not shown, and why. steps: those in the history of the last run's benchmarks.
    """

    runs: tuple[Run, ...]
    comparison: Comparison | None
    left_out: tuple[str, ...]
    steps: Steps = NO_STEPS


@dataclass(frozen=True)
class Member:
    """One run that was asked for: what of it can be read, whether that is the whole, and what is wrong."""

    run: Run | None
    whole: bool
    wrong: tuple[str, ...] = ()


def read(which: Sequence[str], base: str | None, storage: Path | str) -> Reading:
    """Read runs, oldest first, and judge the last against `base`, by default the first if there are more.

    What is one file by two names is one run.

    Raises:
        GateError: if there is nothing to show in any of them, or a name means several.
    """
    names = [*which] if base is None else [*which, base]
    members = {name: _member(name, storage) for name in dict.fromkeys(names)}
    return _with_steps(_reading(members, which, base, storage))


def read_runs(
    runs: Sequence[Run],
    base: str | None,
    storage: Path,
    left_out: Sequence[str] = (),
    *,
    names: Collection[str] = (),
    since: str = "",
    last: int | None = None,
) -> Reading:
    """Read runs that are at hand, oldest first, with their files in `storage`; as `read` does.

    Args:
        base: what the last is judged against: the latest run of that name, whether it is shown or not.
        left_out: what could not be read, and why.
        names: of the runs to be shown; all without any.
        since: the time, in ISO 8601, before which none is shown.
        last: how many are shown at most, the latest.

    Raises:
        GateError: code 3, for a name that no run has, or if there is nothing to show.
    """
    for name in [*names, *([base] if base is not None else [])]:
        if not any(run.name == name for run in runs):
            known = ", ".join(sorted({run.name for run in runs})) or "none"
            raise GateError(f"no run {name!r} is kept (there: {known}): give one of these names")
    wanted = [run for run in runs if run.datetime >= since and (not names or run.name in names)]
    wanted = wanted[-last:] if last else wanted
    if not wanted:
        raise GateError(
            f"there is nothing to show since {since}: give an earlier day" if since else "no run is kept"
        )
    against = next((run for run in reversed(runs) if run.name == base), None)
    key = {id(run): run.path.relative_to(storage).as_posix() for run in runs}
    members = {key[id(run)]: Member(_tamed(run), True, tuple(_problems(run))) for run in runs}
    which = [key[id(run)] for run in wanted]
    found = _reading(members, which, key[id(against)] if against else None, storage)
    return _with_steps(replace(found, left_out=(*left_out, *found.left_out)))


def _with_steps(found: Reading) -> Reading:
    return replace(found, steps=find_steps(found.runs))


def _reading(
    members: Mapping[str, Member], which: Sequence[str], base: str | None, storage: Path | str
) -> Reading:
    """What to show of `members`, by name: those of `which`, the last of them judged against `base`."""
    asked = {name: members[name] for name in ([*which] if base is None else [*which, base])}
    left_out = dict.fromkeys(line for member in asked.values() for line in member.wrong)
    first: dict[object, str] = {}
    alike = {name: first.setdefault(_file(member, name), name) for name, member in asked.items()}
    left_out |= {f"{name} is the same file as {same}": None for name, same in alike.items() if name != same}
    which, base = list(dict.fromkeys(alike[name] for name in which)), None if base is None else alike[base]
    shown = [run for name in which if (run := _showable(members[name].run)) is not None]
    if not shown:
        raise GateError(next(iter(left_out), f"there is nothing to show in {', '.join(which)}"))
    against = base if base is not None else which[0] if len(which) > 1 else None
    if against is None or against == which[-1]:  # and nothing is judged against itself
        return Reading(tuple(shown), None, tuple(left_out))
    before, after = members[against], members[which[-1]]
    if before.run and after.run and before.whole and after.whole:
        return _judged(before.run, after.run, storage, tuple(shown), tuple(left_out))
    missing = " and ".join(dict.fromkeys(name for name in (against, which[-1]) if not members[name].whole))
    return Reading(tuple(shown), None, (f"nothing is judged, for lack of {missing}", *left_out))


def _judged(
    base: Run, head: Run, storage: Path | str, shown: tuple[Run, ...], left_out: tuple[str, ...]
) -> Reading:
    """The runs with a comparison of two of them or, where there can be none, a line that says why."""
    if path := shared(base, head):
        why = f"both have the session {path.stem}, which always equals itself"
        return Reading(shown, None, (f"nothing is judged: {why}", *left_out))
    try:
        noise = read_noise(storage, [base, head])
    except GateError as error:
        return Reading(shown, None, (f"nothing is judged: {error}", *left_out))
    return Reading(shown, compare_saved(base, head, noise), left_out)


def _file(member: Member, name: str) -> object:
    """The identity of a run's file, by whatever name it was asked for."""
    if member.run is None:
        return name
    files = (path.stat() for path in member.run.paths)
    return tuple((about.st_dev, about.st_ino) for about in files)


def _member(which: str, storage: Path | str) -> Member:
    try:
        resolve(which, storage)
    except GateError as error:
        if error.code is Exit.USAGE:  # it may mean several runs: whoever asks has to say which
            raise
    try:
        run = load(which, storage)
    except (GateError, OSError) as error:
        found = _salvaged(which, storage)
        return found if found.run else Member(None, False, (str(error),))
    return Member(_tamed(run), True, tuple(_problems(run)))


def _salvaged(which: str, storage: Path | str) -> Member:
    """The entries that can be read of a run that can't be read as a whole, if there are any."""
    try:
        path = resolve(which, storage).path
        data = json.loads(path.read_text(encoding="utf-8"))
    except (GateError, OSError, ValueError, RecursionError):
        return Member(None, False)
    entries = data.get("benchmarks") if isinstance(data, dict) else None
    entries = entries if isinstance(entries, list) else []
    count = Counter(map(_name, entries))
    found: Run | None = None
    benchmarks: dict[str, Benchmark] = {}
    wrong: list[str] = []
    for entry in entries:
        try:
            found = parse({**data, "benchmarks": [entry]}, path)
        except GateError as error:
            wrong.append(f"{path.name}: {error}")
        else:
            (name,) = found.benchmarks
            if count[name] == 1:
                benchmarks |= found.benchmarks
            else:
                wrong.append(f"{path.name}: {name} is there {count[name]} times: measure it once a run")
    if found is None or not benchmarks:
        return Member(None, False)
    run = replace(found, benchmarks=benchmarks)
    return Member(_tamed(run), False, (*dict.fromkeys(wrong), *_problems(run)))


def _tamed(run: Run) -> Run:
    """A run in whose notes there is no number too large to calculate with."""
    tame = {
        name: replace(b, info={key: value for key, value in b.info.items() if not _too_large(value)})
        for name, b in run.benchmarks.items()
    }
    return replace(run, benchmarks=tame)


def _too_large(value: object) -> bool:
    return isinstance(value, int) and not -FLOAT_MAX <= value <= FLOAT_MAX


def _name(entry: Any) -> str | None:
    name = entry.get("fullname") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _showable(run: Run | None) -> Run | None:
    """A run without the benchmarks whose record is not one that can be read; None if that leaves none."""
    kept = {name: b for name, b in run.benchmarks.items() if "" not in b.problems} if run else {}
    return replace(run, benchmarks=kept) if run and kept else None


def _problems(run: Run) -> Iterator[str]:
    """A line for each thing that is wrong in a run, whichever benchmarks it is wrong in."""
    found: dict[tuple[str, str], list[str]] = {}
    for benchmark in run.benchmarks.values():
        for metric, why in benchmark.problems.items():
            found.setdefault((metric, why), []).append(benchmark.fullname)
    for (metric, why), names in found.items():
        what = f", {named(METRICS[metric])}," if metric in METRICS else f", {metric}," if metric else ""
        more = f" (and so in {len(names) - 1} more)" if len(names) > 1 else ""
        yield f"{run.path.name}: {names[0]}{what} {why}{more}"
