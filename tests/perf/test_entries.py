"""A benchmark's entry: ours lies under one key, a stranger's notes change nothing, files from before are
still read."""

from __future__ import annotations

import csv
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine import InputError
from perf import report
from perf.ab import blocks
from perf.benchmarks.workloads import fixed
from perf.errors import Exit, GateError
from perf.gate import saved_runs
from perf.gate.comparison import Outcome
from perf.gate.saved_runs import Run
from perf.gate.verdict import compare
from perf.measure.case import PerfCase
from perf.measure.session import BenchSession
from tests.perf import fake_runs
from tests.perf.test_case import Fixture, Scripted

pytestmark = pytest.mark.usefixtures("imported_for_measuring", "quick_machine_speed")
KEY = "dynamic_batch"
TIMES = [0.1, 0.101, 0.1, 0.099, 0.1, 0.1]
NAME = "test_x.py::test_x"
DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"deeper": DEEP}
LOOKALIKE = {"backend": "b", "model": "m", "workload": "w", "group": "g", "schema": 1}
LOOKALIKE |= {"fingerprint": {"cpu": "x"}, "rounds": {"tokens_per_s": [1.0] * 6}}
NOTES: list[dict[str, Any]] = [
    {"rounds": 5}, {"rounds": {"first": [1, 2]}}, {"gate": "strict"}, {"gate": {"open": True}}, {"seed": 3},
    {"schema": 1, "rounds": [1]}, {"schema": 1, "rounds": {"tokens_per_s": [1.0]}}, {"fingerprint": "abc"},
    {"schema": 3, "fingerprint": {"cpu": "x"}, "rounds": {"warmup": 2}},
    {"schema": "1", "fingerprint": {"cpu": "x"}, "rounds": {"tokens_per_s": [1.0]}},
    {"model": "a", "backend": "b", "batch_size": [1, 2], "arrivals": "poisson:8", "group": 7, "workload": {}},
    {"canary_matmul_gflops": 100.0, "canary_copy_gbps": "fast", "rounds_voided": "none", "round_s": math.nan},
    {"tokens_per_s": math.inf, "policy": math.nan, "offered_rate": -1},
    {"run": "x", "benchmark": 1, "commit": {}}, {KEY: True}, {KEY: {"max_batch": 8}}, {KEY: [1]},
    {"schema": 1, "fingerprint": {"cpu": "x"}, "rounds": {}},
    {"schema": 7, "fingerprint": {"cpu": "x"}, "rounds": {"tokens_per_s": [1.0] * 6}},
    {**LOOKALIKE, "rounds": {}}, {**LOOKALIKE, "rounds": {"ttft_p99_ms": [1.0] * 6}},
    {**LOOKALIKE, "model": None}, {**LOOKALIKE, "rounds": {"tokens_per_s": 1.0}},
    {**LOOKALIKE, "fingerprint": {}}, {**LOOKALIKE, "schema": True}, {KEY: {"schema": "v1"}},
    {KEY: {"schema": 2}}, {KEY: {"schema": 2, "gate": "strict"}},
    {KEY: {"schema": 2, "gate": {"open": True}}}, {KEY: {"schema": 2, "rounds": {"tokens_per_s": [1.0] * 6}}},
    {KEY: {"schema": 2, "fingerprint": {"cpu": "x"}, "rounds": {"tokens_per_s": [1.0] * 6}}},
    {KEY: {"schema": 2, "gate": "[]"}}, {KEY: {"schema": 2, "gate": "{}"}},
    {KEY: {**LOOKALIKE, "schema": "2"}}, {"huge": "x" * 100_000, "long": [0] * 100_000}, {"deep": DEEP},
    {"": None, "\x1b[31m": "\u202e", "a": [{"b": [None, {"c": math.nan}]}]},
]  # fmt: skip


def plain(extra: Any, times: list[float] = TIMES) -> dict[str, Any]:
    return {"fullname": NAME, "group": None, "extra_info": extra, "stats": {"data": times}}


def run(*entries: dict[str, Any], name: str = "run") -> Run:
    """A run of three sessions that agree."""
    data = {"benchmarks": list(entries), "machine_info": {"system": "Linux"}}
    return fake_runs.several(saved_runs.parse(data, f"{name}.json"))


def nested(entry: dict[str, Any], **notes: Any) -> dict[str, Any]:
    """The same entry as it is recorded today."""
    return {**entry, "extra_info": {**notes, KEY: {**entry["extra_info"], "schema": 2}}}


@pytest.mark.parametrize("notes", NOTES, ids=lambda notes: "-".join(map(repr, notes))[:40])
def test_a_strangers_notes_neither_break_nor_change_a_comparison(tmp_path: Path, notes: dict[str, Any]):
    slower = [time * 1.2 for time in TIMES]
    bare = compare(run(plain({})), run(plain({})))
    for base, head in (({}, notes), (notes, {}), (notes, notes)):
        sides = {"base": plain(base), "head": plain(head)}
        files = [fake_runs.save(tmp_path, side, [entry]) for side, entry in sides.items()]
        loaded = [fake_runs.several(saved_runs.load(file)) for file in files]
        comparison = compare(*loaded)
        assert comparison.verdicts[0].reason == bare.verdicts[0].reason
        assert (comparison.outcome, comparison.notes) == (Outcome.PASS, ())
        assert report.page(loaded, comparison)
        assert report.markdown(loaded, comparison)
        worse = compare(run(plain(base)), run(plain(head, slower)))
        assert (worse.exit, worse.notes) == (Exit.REGRESSION, ())
    file = tmp_path / "runs.csv"
    report.write(loaded, csv=file)
    csv.field_size_limit(1 << 20)
    (row, _) = csv.DictReader(file.open())
    assert (row["run"], row["benchmark"]) == ("base", NAME)
    assert json.loads(row["rounds.round_s"]) == TIMES * 3
    assert not blocks.merge([run(plain(notes))] * 4, "merged").benchmarks[NAME].problems


@pytest.mark.parametrize("notes", NOTES, ids=lambda notes: "-".join(map(repr, notes))[:40])
def test_nor_do_they_beside_a_record_of_ours(notes: dict[str, Any]):
    entry = fake_runs.entry(
        "32", "batch_size", random.Random(0), batch_size=32, **fake_runs.speeds(60_000, 32)
    )
    alone, beside = run(nested(entry)), run(nested(entry, **{k: v for k, v in notes.items() if k != KEY}))
    (ours,), (noted,) = alone.benchmarks.values(), beside.benchmarks.values()
    assert noted.rounds == ours.rounds
    assert noted.info == ours.info
    assert compare(alone, beside).notes == ()


def test_what_is_no_json_is_no_trouble_in_the_session_itself():
    odd = {"path": Path("x"), "set": {1}, "bytes": b"x", 3: "three", "rounds": object(), "gate": print}
    assert compare(run(plain(odd)), run(plain({}))).exit is Exit.PASS
    for extra in (None, [], "text", 3):
        assert compare(run(plain(extra)), run(plain({}))).exit is Exit.PASS


def test_a_file_from_before_the_key_is_read_and_compared_with_one_of_today(tmp_path: Path):
    flat = fake_runs.benchmarks(1)
    for base, head in ((flat, flat), (flat, [*map(nested, flat)]), ([*map(nested, flat)], flat)):
        old = saved_runs.load(fake_runs.save(tmp_path, "old", base))
        new = saved_runs.load(fake_runs.save(tmp_path, "new", head))
        assert not [verdict.reason for verdict in compare(old, new).verdicts if verdict.metric is None]
        for name, before in old.benchmarks.items():
            after = new.benchmarks[name]
            assert before.rounds == after.rounds
            assert before.fingerprint == after.fingerprint
            assert {**before.info, "schema": 0} == {**after.info, "schema": 0}
            assert before.group == after.group
    slower = [nested(entry) for entry in fake_runs.benchmarks(1, 0.5)]
    assert compare(run(*flat), run(*slower)).exit is Exit.REGRESSION


@pytest.mark.parametrize("name", ["peers-cpu.json", "peers-qwen-shape-cpu.json"])
def test_the_committed_runs_are_read_as_they_were(name: str):
    path = Path(saved_runs.__file__).parents[1] / "saved" / name
    loaded = saved_runs.load(path)
    raw = json.loads(path.read_text())["benchmarks"]
    # Where the benchmarks are now; they were in perf/ itself.
    assert [*loaded.benchmarks] == [entry["fullname"].replace("perf/", "perf/benchmarks/") for entry in raw]
    for entry, benchmark in zip(raw, loaded.benchmarks.values(), strict=True):
        extra = entry["extra_info"]
        assert not benchmark.problems
        assert benchmark.rounds == {metric: tuple(values) for metric, values in extra["rounds"].items()}
        assert benchmark.fingerprint == extra["fingerprint"]
        assert benchmark.info == {k: v for k, v in extra.items() if k not in ("rounds", "fingerprint")}
    verdicts = compare(loaded, loaded).verdicts
    assert {verdict.outcome for verdict in verdicts} <= {Outcome.PASS, Outcome.INCONCLUSIVE}


@pytest.mark.parametrize(("change", "says"), [
    ({"schema": 3}, "is of schema 3, not 2"), ({"schema": 1}, "is of schema 1, not 2"),
    ({"fingerprint": {}}, "no fingerprint"), ({"rounds": {}}, "no rounds"), ({"rounds": 3}, "no rounds"),
])  # fmt: skip
def test_a_record_of_ours_that_lacks_what_it_needs_is_a_problem(change: dict[str, Any], says: str):
    entry = nested(
        fake_runs.entry("32", "batch_size", random.Random(0), batch_size=32, **fake_runs.speeds(60_000, 32))
    )
    entry["extra_info"][KEY] |= change
    entry["stats"] = {"data": TIMES}  # never judged by its time instead
    comparison = compare(run(entry), run(entry))
    assert comparison.exit is Exit.NOT_COMPARABLE
    assert says in comparison.verdicts[0].reason


def test_a_file_that_no_reader_could_read_is_not_comparable(tmp_path: Path):
    for number, text in enumerate(("[" * 100_000, '{"benchmarks": ' + "9" * 5000 + "}")):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(GateError, match="cannot be read as JSON"):
            saved_runs.load(path)


@cache
def bench() -> BenchSession:
    """One session for all: what it knows of its model takes seconds to find out."""
    return BenchSession(model="random:tiny-llama", dtype=None, rounds=1, quick=False, inject_slowdown=0.0)


def measure(backend: Any, fixture: Any = None, **how: Any) -> dict[str, Any]:
    case = PerfCase(bench(), fixture or Fixture(), None)
    return case.measure("g", backend, fixed(1, 4, 2, 256), device="cpu", max_batch_size=1, **how)


@pytest.mark.parametrize("name", ["rounds", "schema", "gate", "seed", "fingerprint", "model"])
def test_what_a_record_says_of_itself_cannot_be_given_another_meaning(name: str):
    backend = Scripted()
    with pytest.raises(InputError, match=f"extra= has {name}, which the record says of itself: give it an"):
        measure(backend, extra={name: 1})
    assert backend.log == []
    fixture = Fixture()
    with pytest.raises(InputError, match=f"derive= has {name}"):
        measure(backend, fixture, derive=lambda flat, metrics: {name: 1})
    assert fixture.extra_info == {}


def test_a_record_lies_beside_the_notes_of_others_and_not_in_their_place():
    fixture = Fixture()
    fixture.extra_info = {"rounds": 7, "schema": "mine"}
    info = measure(Scripted(), fixture)
    assert fixture.extra_info == {"rounds": 7, "schema": "mine", "dynamic_batch": info}
    fixture.extra_info = {"dynamic_batch": True}
    with pytest.raises(InputError, match=r"extra_info\['dynamic_batch'\] is where the gate keeps its record"):
        measure(Scripted(), fixture)
