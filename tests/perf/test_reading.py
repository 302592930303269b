"""Reports of runs of which some cannot be read: the rest is shown, what is left out is named; the gate stays
strict."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from perf import cli
from perf.errors import GateError
from perf.gate.comparison import Outcome
from perf.report import comparison_table, frame, markdown, page, read, runs_table
from perf.report.text import number
from tests.perf import fake_runs
from tests.perf.test_report import Page, shown


def entry(name: str = "8", rate: float = 1000.0, **extra: object) -> dict[str, object]:
    return fake_runs.entry(
        name, "batch_size", random.Random(0), 8, batch_size=8, **fake_runs.speeds(rate, 8), **extra
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two good runs, 1 and 3, with room for a bad one between them or after them; we stand there.

    Sessions of this machine are known to agree, so that one a side is enough.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    first = fake_runs.save(tmp_path, "first", [entry("8"), entry("9")], 1)
    fake_runs.save(tmp_path, "third", [entry("8", 800.0), entry("9")], 3)
    fake_runs.quiet(tmp_path / ".benchmarks", [first])
    return tmp_path


@pytest.fixture
def report(capsys):
    """`report(args)` gives the exit code, and what terminal, Markdown and page say, or the error."""

    def call(*args: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *args, "--html", "r.html", "--markdown", "r.md", "--csv", "r.csv"])
        out, errors = capsys.readouterr()
        if end.value.code:
            return int(end.value.code), [errors]
        written = Path("r.md").read_text(), "".join(Page(Path("r.html").read_text()).text)
        return 0, [" ".join(text.split()) for text in (out, *written)]

    return call


EMPTY = '{"machine_info": {}, "benchmarks": []}'
BAD = {
    "a night in which all failed": ("", "cannot be read as JSON"),
    "likewise, saved by name": (EMPTY, "is empty: every benchmark was skipped, deselected or ended with an"),
    "truncated": ('{"benchmarks": [{"fullname": "a", ', "cannot be read as JSON"),
    "a list": ("[1, 2]", "is not a pytest-benchmark run"),
    "another tool's": ('{"results": []}', "is not a pytest-benchmark run"),
    "no text": ("\xff\xfe", "cannot be read as JSON"),
    "too deep": ("[" * 100_000, "cannot be read as JSON"),
    "too long a number": (f'{{"benchmarks": {"9" * 5000}}}', "cannot be read as JSON"),
    "entries that are none": ('{"benchmarks": [3]}', "has a benchmark without a fullname"),
    "newer": (json.dumps({"benchmarks": [entry(schema=9), entry("9", schema=9)]}), "is of schema 9, not 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_member_is_named_and_the_rest_is_reported(folder, report, kind):
    text, why = BAD[kind]
    (folder / "0002_bad.json").write_text(text, encoding="latin-1")
    code, said = report("0001_first.json", "0002_bad.json", "0003_third.json")
    assert code == 0
    for form in said:
        assert "0002_bad.json" in form.replace("&#95;", "_")
        assert why.replace("'", "") in form.replace("'", "").replace("&#39;", "")
        assert "FAIL: 5 regressions, 15 unchanged" in form
    assert "2 runs, from 2026-11-01" in said[2]
    assert Path("r.csv").read_text().count("\n") == 5


@pytest.mark.parametrize("kind", BAD)
def test_to_the_gate_it_is_an_error_on_either_side(folder, capsys, kind):
    (folder / "0002_bad.json").write_text(BAD[kind][0], encoding="latin-1")
    for pair in (("0001_first.json", "0002_bad.json"), ("0002_bad.json", "0001_first.json")):
        with pytest.raises(SystemExit) as end:
            cli.main(["compare", *pair])
        assert end.value.code == 3
        assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", BAD)
def test_where_nothing_can_be_read_it_is_an_error(folder, report, kind):
    (folder / "0002_bad.json").write_text(BAD[kind][0], encoding="latin-1")
    code, (errors,) = report("0002_bad.json")
    assert code == 3
    assert errors.startswith("error: ")
    assert BAD[kind][1] in errors
    assert not Path("r.html").exists()


def test_files_that_are_not_there_are_left_out_too(folder, report):
    (folder / "a folder.json").mkdir()
    (folder / "lost.json").symlink_to("nowhere")
    code, said = report("0001_first.json", "a folder.json", "lost.json", "x" * 5000, "0003_third.json")
    assert code == 0
    for form in said:
        assert "is a folder" in form
        assert "FAIL: 5 regressions, 15 unchanged" in form
    assert "Left out: 3" in said[2]


@pytest.mark.parametrize("args", [
    ["0001_first.json", "0003_third.json", "0002_bad.json"],
    ["0002_bad.json", "0001_first.json", "0003_third.json"],
    ["0001_first.json", "0003_third.json", "--base", "0002_bad.json"],
    ["0001_first.json", "0003_third.json", "--base", "no"],
])  # fmt: skip
def test_nothing_is_judged_where_one_of_the_two_is_missing(folder, report, args):
    """Least of all is another run judged in its place."""
    (folder / "0002_bad.json").write_text(EMPTY)
    code, said = report(*args)
    assert code == 0
    missing = "no" if "no" in args else "0002_bad.json"
    for form in said:
        assert f"nothing is judged, for lack of {missing}" in form.replace("&#95;", "_")
        assert "FAIL" not in form
        assert "800" in form  # the figures of the last one that can be read
    assert "2 runs" in said[2]


TWICE = [entry("7"), entry("7", 10.0)]
PLAIN = {"fullname": "t.py::test_batch_size[7]"}  # of pytest-benchmark without us
HUGE = entry("7") | {"extra_info": {**entry()["extra_info"], "rounds": {"goodput": [10**400]}}}
IN_ONE = {
    "no name": ([{"stats": {}}], "has a benchmark without a fullname", False),
    "twice": (TWICE, "test_batch_size[7] is there 2 times", False),
    "no tolerances": ([entry("7", gate="{")], "is not a JSON object of tolerances", False),
    "a newer record": ([entry("7", schema=2)], "test_batch_size[7] is of schema 2, not 1", True),
    "no fingerprint": ([entry("7", fingerprint={})], "test_batch_size[7] has no per-round data", True),
    "no record": ([PLAIN | {"stats": {"mean": 1}}], "has no per-round data", True),
    "no stats": ([PLAIN], "has no per-round data", True),
    "stats of NaN": ([PLAIN | {"stats": {"data": [1, math.nan]}}], "round time, s, has nan among its", True),
    "a round of no number": ([HUGE], "goodput, req/s, has 1000", True),
}


@pytest.mark.parametrize("kind", IN_ONE)
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_benchmark_is_named_and_its_run_is_reported(folder, report, kind, last):
    entries, why, whole = IN_ONE[kind]
    fake_runs.save(folder, "second", [*entries, entry("8", 900.0)], 2)
    runs = ["0001_first.json", "0003_third.json"]
    runs.insert(2 if last else 1, "0002_second.json")
    code, said = report(*runs)
    assert code == 0
    judged = whole or not last
    for form in said:
        plain = form.replace("&#95;", "_").replace("&#91;", "[").replace("&#93;", "]")
        assert "0002_second.json" in plain
        assert why in plain
        assert ("nothing is judged, for lack of 0002_second.json" in plain) is not judged
        assert ("FAIL" in form) is judged
    assert "3 runs, from 2026-11-01" in said[2]
    if last:
        assert said[2].count("All 1 benchmarks") == (
            1 if kind != "stats of NaN" and kind != "a round of no number" else 0
        )


def test_one_reason_in_many_benchmarks_is_one_line(folder):
    fake_runs.save(folder, "second", [entry("8"), *(entry(str(i), schema=2) for i in range(100, 700))], 2)
    found = read(["0002_second.json"], None, folder)
    assert found.left_out == (
        "0002_second.json: perf/benchmarks/test_batch_size.py::test_batch_size[100] is of schema 2, not 1: "
        "measure it again with this version (and so in 599 more)",
    )
    assert [list(run.benchmarks) for run in found.runs] == [
        ["perf/benchmarks/test_batch_size.py::test_batch_size[8]"]
    ]


def test_what_a_report_judges_it_judges_as_the_gate_does(folder):
    """A benchmark that is left out of the figures is no less missing in the comparison."""
    fake_runs.save(folder, "fourth", [entry("8"), entry("9", schema=2)], 4)
    found = read(["0001_first.json", "0004_fourth.json"], None, folder)
    assert found.comparison is not None
    assert found.comparison.outcome is Outcome.ERROR
    assert [len(run.benchmarks) for run in found.runs] == [2, 1]


def test_of_very_many_lines_the_page_alone_has_all(folder):
    for number_ in range(100, 160):
        (folder / f"{number_:04d}_bad.json").write_text(EMPTY)
    names = [f"{number_:04d}_bad.json" for number_ in range(100, 160)]
    found = read(["0001_first.json", *names, "0003_third.json"], None, folder)
    assert len(found.left_out) == 60
    assert found.comparison is not None
    tables = comparison_table(found.comparison, found.left_out), runs_table(found.runs, found.left_out)
    for text in (*map(shown, tables), markdown(found.runs, found.comparison, found.left_out)):
        assert "119" in text
        assert "0120" not in text
        assert "and 40 more, which are all in the HTML page" in text
    assert all(name in page(found.runs, found.comparison, found.left_out) for name in names)


JUNK = [math.nan, math.inf, -1, 0, 10**400, -(10**400), True, "text", "\ud800", [1], {"a": 1}, None]
KEYS = ["batch_size", "tokens_per_s", "ttft_p95_ms", "offered_rate", "slo_ttft_ms", "goodput", "policy"]
KEYS += ["model", "backend", "group", "ratio_to_engine", "speedup", "canary_copy_gbps", "prompt_tokens"]
KEYS += ["rounds_voided"]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_no_value_in_a_run_stops_a_report(folder, junk):
    for at, name in ((4, "base"), (5, "head")):
        entries = fake_runs.benchmarks(at)
        for i, each in enumerate(entries):
            each["extra_info"][KEYS[i % len(KEYS)]] = junk
            each["extra_info"][KEYS[(i // 2) % len(KEYS)]] = junk
        fake_runs.save(folder, name, entries, at)
    found = read(["0004_base.json", "0005_head.json"], None, folder)
    assert found.comparison is not None
    assert len(found.runs) == 2
    Page(page(found.runs, found.comparison, found.left_out))
    assert markdown(found.runs, found.comparison, found.left_out)
    assert shown(comparison_table(found.comparison, found.left_out))
    assert len(frame(found.runs)) == 2 * len(found.runs[0].benchmarks)


def test_top_level_notes_of_any_kind_stop_no_report(folder):
    odd = {"machine_info": 3, "commit_info": {"id": [1], "dirty": "?"}, "datetime": {"a": 1}}
    fake_runs.save(folder, "odd", [entry()], 6, **odd)
    found = read(["0001_first.json", "0006_odd.json"], None, folder)
    Page(page(found.runs, found.comparison, found.left_out))
    assert "[1]" in markdown(found.runs, found.comparison)


def test_odd_numbers_are_shown_as_such():
    odd = [math.nan, math.inf, 10**400, -(10**400), [1, 2]]
    assert [number(value) for value in odd] == ["nan", "inf", "very large", "-very large", "[1, 2]"]


def test_nothing_at_all_is_an_error_that_says_why(folder):
    with pytest.raises(GateError, match="no run 'gone'"):
        read(["gone"], None, folder)


@pytest.mark.parametrize("args", [
    ["1", "first"], ["first", "0001_first.json"], ["first", "--base", "1"], ["first", "first"],
    ["first", "link.json"],
])  # fmt: skip
def test_one_file_by_two_names_is_one_run_and_not_judged_against_itself(tmp_path, args):
    fake_runs.save(tmp_path, "first", [entry("8")], 1)
    (tmp_path / "link.json").hardlink_to(tmp_path / "0001_first.json")
    names = [str(tmp_path / arg) if arg.endswith(".json") else arg for arg in args]
    base = names[2] if "--base" in names else None
    found = read(names[:1] if base else names, base, tmp_path)
    assert found.comparison is None
    assert [run.name for run in found.runs] == ["first"]
    told = [line for line in found.left_out if "is the same file as" in line]
    assert len(told) == len({*args} - {"--base"}) - 1


def test_what_else_was_asked_for_is_still_judged(tmp_path):
    fake_runs.save(tmp_path, "first", [entry("8")], 1)
    fake_runs.save(tmp_path, "second", [entry("8")], 2)
    found = read(["first", "1", "second"], None, tmp_path)
    assert [run.name for run in found.runs] == ["first", "second"]
    assert found.comparison is not None
    assert (found.comparison.base.name, found.comparison.head.name) == ("first", "second")
