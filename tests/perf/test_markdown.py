"""The Markdown summary: never more than GitHub shows, the most important first, and never a broken table."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from perf import cli
from perf.gate.comparison import Comparison, Outcome, Verdict
from perf.gate.metrics import METRICS
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare as judge
from perf.report import comparison_table, markdown, runs_table, write
from perf.report.markdown import GITHUB_BYTES, NAME_LENGTH, ROOM
from perf.report.session_tables import tables
from perf.report.terminal import drawn, table
from perf.report.text import middle, width
from perf.report.verdicts import shorten
from tests.perf import fake_runs
from tests.perf.test_report import Page, shown

KINDS = ("Regressions", "Not compared", "Can't tell", "Better", "Unchanged")
OUTCOMES = (Outcome.FAIL, Outcome.ERROR, Outcome.INCONCLUSIVE, Outcome.PASS, Outcome.PASS)


def name(i: int, kind: str = "") -> str:
    return f"tests/test_{i}.py::test_{kind}[{i}-|`<b>]"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """600 benchmarks with figures."""
    noise, entries = random.Random(0), []
    for i in range(600):
        entries.append(
            fake_runs.entry(str(i), "batch_size", noise, 2, batch_size=i, **fake_runs.speeds(1000.0, 8))
        )
        entries[-1]["fullname"] = name(i)
    return load(fake_runs.save(tmp_path_factory.mktemp("runs"), "head", entries))


@pytest.fixture(scope="module")
def comparison(run) -> Comparison:
    """120 verdicts of each kind; the reasons are all different, so that each has a row of its own."""
    verdicts = []
    for kind, outcome in zip(KINDS, OUTCOMES, strict=True):
        for i in range(120):
            metric = None if outcome is Outcome.ERROR else METRICS["tokens_per_s"]
            why = f"{kind} {i} | <b> " + "why " * 50
            verdict = Verdict(name(i, kind[:3]), "g", metric, outcome, why, 1.0, 2.0, 1.0, 0.9, 1.1, 0.03)
            verdicts.append(replace(verdict, improved=kind == "Better"))
    return Comparison(run, run, tuple(verdicts), ("a note", "another | note"))


def rendered(text: str) -> Page:
    """The Markdown as HTML, which is whole: each table row as wide as its heading, each fold closed."""
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (cells, width) or cells == width, line
        width = cells
    assert text.count("<details>") == text.count("</details>")
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def rows(text: str) -> Counter[str]:
    """How many rows of each kind of verdict are in it, and of figures."""
    found = Counter(
        kind for line in text.splitlines() for kind in KINDS if f"| {kind.replace(chr(39), chr(39))} " in line
    )
    found["figures"] = len(re.findall(r"^\| `test_\[", text, re.M))
    return found


def test_what_fits_is_whole(run, comparison):
    text = markdown([run], comparison, room=10**7)
    rendered(text)
    assert rows(text) == {**dict.fromkeys(KINDS, 120), "figures": 600}
    assert "Cut" not in text


@pytest.mark.parametrize("room", [500, 700, 1000, 5000, 20_000, 60_000, 120_000, 150_000, 190_000, 220_000])
def test_it_is_cut_by_importance_and_says_so(run, comparison, room):
    text = markdown([run], comparison, ["a left-out one"], room=room, whole="out/report.html")
    assert room - 1500 < len(text.encode()) <= room
    rendered(text)
    assert text.startswith("## ❌ FAIL: 120 regressions, 120 not compared, 120 can't tell, 120 better, ")
    kept, whole = rows(text), True
    for kind in (*KINDS, "figures"):
        total = 600 if kind == "figures" else 120
        assert whole or not kept[kind], kind
        whole = whole and kept[kind] == total
        if kept[kind] < total:
            label = "All figures of head" if kind == "figures" else kind
            assert f"{total - kept[kind]} of {total} rows of {label}" in text
    assert "All is in `out/report.html`." in text
    assert "1,024 KiB" in text


def test_where_not_even_the_verdict_has_room_there_is_nothing(run, comparison):
    assert markdown([run], comparison, room=100) == ""
    assert markdown([run], comparison, room=-5) == ""
    assert markdown([run], room=0) == ""


def test_figures_alone_are_cut_too(run):
    text = markdown([run], room=10_000)
    rendered(text)
    assert 9000 < len(text.encode()) <= 10_000
    assert "rows of All figures of head" in text
    assert "the page that `--html` writes" in text


def compare(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", str(folder / "0001_base.json"), str(folder / "0002_head.json"), *options])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_file_stays_under_what_github_shows(tmp_path, monkeypatch):
    """600 benchmarks of ten metrics each, with long ids; 29 have got slower."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for number, run_name in ((1, "base"), (2, "head")):
        entries = []
        for i in range(600):
            point, speeds = f"{i}-{'parameter-' * 8}", fake_runs.speeds(1000.0, 8)
            entries.append(fake_runs.entry(point, "load", random.Random(i), 2, batch_size=i, **speeds))
            if number == 2 and i % 20 == 0:
                entries[-1]["extra_info"]["rounds"]["padded_tokens"] = [i, i]
        fake_runs.save(tmp_path, run_name, entries, number)
    summary, whole = tmp_path / "summary.md", tmp_path / "whole.html"
    assert compare(tmp_path, "--markdown", str(summary), "--html", str(whole)) == 1
    text = summary.read_text(encoding="utf-8")
    assert len(text.encode()) <= ROOM < GITHUB_BYTES == 1 << 20
    assert len(re.findall(r"\d+ more than 0", "".join(rendered(text).text))) == 29
    assert f"All is in `{whole}`." in text
    assert whole.read_text(encoding="utf-8").count("parameter-") > 600


@pytest.mark.parametrize("gap", ["", "\n"])
def test_what_the_file_already_holds_counts(run, comparison, tmp_path, gap):
    others = "what another step said\n\n" + "é" * 450_000 + gap
    path = tmp_path / "step.md"
    path.write_text(others, encoding="utf-8")
    assert write([run], comparison, markdown=path, append=True) == [path]
    written = path.read_text(encoding="utf-8")
    assert written.startswith(others + ("" if gap else "\n\n") + "## ❌ FAIL: ")
    assert ROOM - 1500 < len(written.encode()) <= ROOM
    rendered(written.removeprefix(others))
    assert write([run], comparison, markdown=path) == [path]
    assert path.read_text(encoding="utf-8") == markdown([run], comparison)


def test_a_file_that_is_full_is_left_alone_and_that_is_said(tmp_path, monkeypatch, capsys):
    for number, run_name in ((1, "base"), (2, "head")):
        entry = fake_runs.entry("1", "load", random.Random(0), **fake_runs.speeds(1000.0, 8))
        fake_runs.save(tmp_path, run_name, [entry], number)
    path = tmp_path / "step.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    path.write_text("x" * (ROOM - 100), encoding="utf-8")
    assert compare(tmp_path, "--markdown", str(path)) == 4
    assert path.stat().st_size == ROOM - 100
    assert "has no room left for a summary" in capsys.readouterr().err


LONG = "perf/test_x.py::test_x[" + "first-" * 100 + "{}" + "-last" * 900 + "]"


def long_runs(folder: Path) -> tuple[Run, Run]:
    noise = random.Random(0)
    entries = []
    for middle_part in ("one", "two"):
        entries.append(
            fake_runs.entry("1", "batch_size", noise, 8, batch_size=8, **fake_runs.speeds(1000.0, 8))
        )
        entries[-1]["fullname"] = LONG.format(middle_part)
    other = json.loads(json.dumps(entries))
    for entry in other:
        entry["extra_info"]["rounds"]["tokens_per_s"] = [500.0] * 8
        entry["extra_info"]["rounds_voided"] = 1
    new = json.loads(json.dumps(other[0])) | {"fullname": LONG.format("new")}
    return load(fake_runs.save(folder, "base", entries, 1)), load(
        fake_runs.save(folder, "head", [*other, new], 2)
    )


def test_an_id_of_5_kilobytes_fills_neither_terminal_nor_markdown(tmp_path):
    base, head = long_runs(tmp_path)
    judged = judge(base, head)
    left_out = [f"{LONG.format('one')} is not there"]
    terminal = shown(comparison_table(judged, left_out)), shown(runs_table([head], left_out))
    summary = markdown([base, head], judged, left_out)
    for text in (*terminal, summary):
        assert len(text) < 12_000
        assert "first-first-" in text
        assert "-last]" in text
        names = set(re.findall(r"test_x\[[^\s`]*\]", text.replace("&#91;", "[").replace("&#93;", "]")))
        assert all(len(found) <= NAME_LENGTH for found in names)
    assert len({row.split("`")[1] for row in summary.splitlines() if row.startswith("| `")}) == 3
    regressions = terminal[0][: terminal[0].index("note: ")]
    assert len({line.split()[0] for line in regressions.splitlines() if "tokens/s" in line}) == 2
    assert all(len(line) <= 160 for text in terminal for line in text.splitlines())
    narrow = shown(comparison_table(judged, left_out), width=80)
    assert len(set(re.findall(r"test_x\[fi…\w{10}…ast-last\]", narrow))) == 3
    assert LONG.format("one").split("::")[1] in write_page(tmp_path, base, head, judged)


def write_page(folder: Path, base: Run, head: Run, judged: Comparison) -> str:
    write([base, head], judged, html=folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def test_the_tables_at_the_end_of_a_session_fit_the_width_there_is():
    rates = {"tokens_per_s": 1234.5, "ratio_to_engine": None, "rounds": {"tokens_per_s": [1.0] * 5}}
    what = {"workload": "mixed-32", "model": "m", "dtype": "float32", "device": "cpu", "batch_size": 2}
    rows_ = [{"backend": f"{'x' * 5000}\x1b{i}", "group": "peers", **what, **rates} for i in range(2)]
    [(title, peers)] = tables(rows_)
    assert title == "peers: mixed-32 on m, float32, cpu, batch 2"
    for width_ in (80, 100, 200):
        found = drawn(peers, width_)
        assert max(map(len, found)) <= width_
        names = [line.split()[0] for line in found if "xxx" in line]
        assert len(names) == len(set(names)) == 2
        assert {len(found_name) for found_name in names} == {max(20, width_ * 3 // 8)}
        assert "\x1b" not in "".join(found)
    assert [line.split()[1:3] for line in drawn(peers, 200) if "xxx" in line] == [["1,234.5", "-"]] * 2


@pytest.mark.parametrize("room", [70, 80, 100, 120, 180])
def test_no_word_of_a_table_is_broken_where_there_is_room_for_all(room):
    heading = ("benchmark", "tokens/s", "TTFT P95, ms", "95 % interval", "why")
    rows_ = [
        [f"test_{i}[cuda-{'x' * i}]", "123,456", "17,008", "-22.0 to -18.8%", "worse " * 40 + "y" * 400]
        for i in (2, 9)
    ]
    found = drawn(table(heading, rows_, heading[1:4], room), room)
    assert max(map(len, found)) <= room
    text = " ".join(found).split()
    assert "".join(text).count("y") == 2 * 400 + 1  # and that of the heading
    for word in (*" ".join(heading).split(), "123,456", "17,008", "-18.8%", *(row[0] for row in rows_)):
        assert word in text
    assert text.count("worse") == 80


ids = st.text(alphabet="ab[]-é日本", min_size=0, max_size=40)


@given(st.lists(st.tuples(ids, ids, ids), unique=True, max_size=12), st.integers(20, 30))
def test_shortened_ids_are_short_and_as_many_as_before(parts, most):
    known = [f"t.py::{'a' * 10}{one}{'-' * 50}{two}{'-' * 50}{three}{'b' * 10}" for one, two, three in parts]
    known += [f"t.py::{one}" for one, _, _ in parts]
    found = shorten(known, most)
    assert list(found) == list(dict.fromkeys(known))
    assert len(set(found.values())) == len(found)
    assert all(width(short) <= most for short in found.values())
    for full, short in found.items():
        last = full.split("::")[1]
        assert short in (last, full) or "…" in short
        if "…" in short:
            assert last.startswith(short.split("…")[0]) or full.startswith(short.split("…")[0])
            assert last.endswith(short.split("…")[-1])


@given(st.text(max_size=50), st.integers(1, 60))
def test_the_middle_goes_and_the_ends_stay(text, most):
    found = middle(text, most)
    assert width(found) <= most
    assert found == text or (most - 2 <= width(found) and width(text) > most)
    begin, _, end = found.partition("…")
    if "…" not in text and found != text:
        assert text.startswith(begin)
        assert text.endswith(end)
        assert -1 <= width(begin) - width(end) <= 2


def test_wide_characters_count_as_what_they_take_of_a_terminal():
    known = [f"t.py::test_{'表' * 200}[{i}]" for i in range(3)]
    assert width("表a") == 3
    found = shorten(known, 30)
    assert len(set(found.values())) == 3
    assert all(cell_len(short) <= 30 for short in found.values())
    assert middle("日本語" * 9, 10) == "日本…本語"
