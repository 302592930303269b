"""A saved run of what files of one tool have: N files are N rounds of each load that all of them hold.

It is as pytest-benchmark saves one. Of the machine nothing is said, for no file tells which it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from perf.errors import Exit, GateError
from perf.gate import entries, tolerances, writing
from perf.gate.entries import Flat, differences
from perf.gate.metrics import GATED, METRICS, POOLED
from perf.gate.pooling import Sample, gathered
from perf.importers import Measured, Tool
from perf.importers.readers import read

GROUP = "imported"
Round = tuple[str, Measured]  # where it is written, in words, and what it says
Limits = Mapping[str, Mapping[str, float]]  # rel and abs, by metric
_NONE: Limits = MappingProxyType({})


def rounds_of(tool: Tool, paths: Sequence[Path]) -> dict[str, list[Round]]:
    """Read files of a tool; gives the rounds of each benchmark by its name, in the order of the files.

    Raises:
        GateError: as `perf.importers.readers.read`; with code 2 for a file that is given twice, with 3 for
            files that are not of the same loads.
    """
    found: dict[str, list[Round]] = {}
    held: list[set[str]] = []  # the loads of each file
    for at, path in enumerate(paths):
        if any(path.exists() and path.samefile(other) for other in paths[:at]):
            raise GateError(f"{str(path)!r} is given twice: a file is one round", Exit.USAGE)
        held.append(set())
        for where, measured in read(tool, path):
            name = f"{GROUP}::load[{measured.identity.arrivals}]"
            found.setdefault(name, []).append((where, measured))
            held[at].add(name)
        if held[at] != held[0]:
            other = ", ".join(sorted(held[at] ^ held[0]))
            files = f"{paths[0]} and {path} are not of the same loads ({other})"
            raise GateError(f"{files}: import rounds of one load together")
    for rounds in found.values():
        _check_alike(rounds)
    return found


def run_of(tool: Tool, rounds: Mapping[str, Sequence[Round]], limits: Limits = _NONE) -> Flat:
    """Return the run as pytest-benchmark's JSON has it, with the commit of the folder that we stand in.

    Args:
        limits: the project's tolerances, by metric; those hold whose metric is recorded.

    Raises:
        GateError: for a value that the gate could not judge, a TTFT of 0 say.
    """
    return writing.run_of([_entry(tool, name, some, limits) for name, some in rounds.items()], {})


def notes(rounds: Sequence[Round]) -> list[str]:
    """How a tool's definitions differ from ours, as its rounds say it."""
    return list(dict.fromkeys(note for _, measured in rounds for note in measured.notes))


def _check_alike(rounds: Sequence[Round]) -> None:
    for (where, before), (other, after) in pairwise(rounds):
        if work := differences(_compared(before), _compared(after)):
            raise GateError(f"{where} and {other} are of different things: {work}; import them apart")


def _compared(measured: Measured) -> Flat:
    """What all rounds of a benchmark have in common."""
    return asdict(measured.identity) | {"version": measured.version, "records": _records(measured)}


def _records(measured: Measured) -> str:
    return "of each request" if measured.by_request else "summaries"


def _entry(tool: Tool, name: str, rounds: Sequence[Round], limits: Limits) -> Flat:
    """A benchmark's entry: the time that each round took, and our record."""
    record = _record(tool, rounds)
    text = json.dumps({metric: dict(limit) for metric, limit in limits.items()})
    if gate := tolerances.used(text, (), record["rounds"]):
        record["gate"] = gate
    return writing.entry(name, GROUP, [measured.seconds for _, measured in rounds], record)


def _record(tool: Tool, rounds: Sequence[Round]) -> Flat:
    samples = [dict(measured.sample) for _, measured in rounds]
    for where, measured in rounds:
        _check_fit(where, measured.sample)
    judged, tails = gathered(samples)
    middle = _middle(rounds)
    numbers = {key: value for key, value in middle.sample.items() if key not in POOLED} | dict(middle.shown)
    prints = {"tool": str(tool), "tool_version": middle.version, "records": _records(middle)}
    try:
        return entries.plain({
            "group": GROUP,
            "backend": str(tool),
            **asdict(middle.identity),
            **numbers,
            **tails,
            "definitions": "; ".join(notes(rounds)),
            "fingerprint": prints,
            "rounds": judged,
        })  # fmt: skip
    except ValueError as error:  # of a number too large to calculate with
        raise GateError(f"{rounds[0][0]}: {error}") from None


def _check_fit(where: str, sample: Sample) -> None:
    for name, value in sample.items():
        metric = METRICS[name]
        assert name in GATED
        if name not in POOLED and (why := metric.unfit(value)):
            raise GateError(f"{where}: {metric.label} is {value}, which {why}")


def _middle(rounds: Sequence[Round]) -> Measured:
    """The round in the middle by its tokens a second."""
    ordered = sorted((measured for _, measured in rounds), key=lambda one: one.sample["tokens_per_s"])
    return ordered[(len(ordered) - 1) // 2]
