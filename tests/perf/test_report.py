"""Reports: what is shown, in which order, that nothing from a file acts, and that the pages need no
network."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from perf.gate.comparison import Comparison, Outcome
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare
from perf.report import comparison_table, frame, markdown, page, runs_table, write
from perf.report.figures import history
from perf.report.text import number
from perf.report.verdicts import headline, parts
from tests.perf import fake_runs
from tests.perf.html_page import Page

EVIL = "<script>alert(1)</script> | `x` [y](https://evil.example) @team {{ 7 * 7 }} {% x \x1b[31m\u202e"


@pytest.fixture
def head(tmp_path: Path) -> Run:
    return load(fake_runs.save(tmp_path, "head", number=2))


@pytest.fixture
def judged(tmp_path: Path) -> Comparison:
    """A regression, a counter that moved, a benchmark gone, one that can't be told, one better, the rest
    unchanged."""
    names = ("slow", "counts", "gone", "noisy", "fast", "same")
    runs = []
    for number_, name in ((1, "base"), (2, "head")):
        noise = fake_runs.random.Random(0)
        entries = {
            n: fake_runs.entry(n, "batch_size", noise, 8, **fake_runs.speeds(1000.0, 8)) for n in names
        }
        if name == "head":
            scale(entries["slow"], "tokens_per_s", [0.8] * 8)
            scale(entries["fast"], "ttft_p50_ms", [0.5] * 8)
            scale(entries["noisy"], "tpot_p50_ms", [1.0, 1.4, 0.9, 1.2, 0.8, 1.3, 1.0, 1.1])
            scale(entries["counts"], "forward_passes", [2] * 8)
            del entries["gone"]
        runs.append(load(fake_runs.save(tmp_path, name, list(entries.values()), number_)))
    return compare(*map(fake_runs.several, runs))


def scale(entry: dict[str, Any], metric: str, by: list[float]) -> None:
    rounds = entry["extra_info"]["rounds"]
    rounds[metric] = [value * factor for value, factor in zip(rounds[metric], by, strict=True)]
    entry["extra_info"][metric] = rounds[metric][0]


def shown(renderable: Any, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(renderable)
    return out.getvalue()


def test_verdicts_come_in_the_order_of_what_a_reader_must_do(judged: Comparison) -> None:
    assert [part.heading for part in parts(judged)] == [
        "Regressions",
        "Not compared",
        "Can't tell",
        "Better",
        "Unchanged",
    ]
    assert [row[0] for row in parts(judged)[0].rows] == ["test_batch_size[slow]", "test_batch_size[counts]"]
    assert [part.folded for part in parts(judged)] == [False, False, False, False, True]
    assert headline(judged).startswith("FAIL: 2 regressions, 1 not compared, 1 can't tell, 1 better, ")
    assert sum(part.count for part in parts(judged)) == len(judged.verdicts)


def test_a_row_has_both_values_the_change_its_interval_and_what_is_allowed(judged: Comparison) -> None:
    slow, counts = parts(judged)[0].rows
    assert slow[1:] == ("tokens/s", "997", "797", "-20.0%", slow[5], "2.0%", slow[7])
    assert re.fullmatch(r"-\d+\.\d to -\d+\.\d%", slow[5])
    assert "worse" in slow[7]
    assert counts[1:7] == ("forward passes", "64", "128", "+100.0%", "-", "none")
    unsure = parts(judged)[2].rows[0]
    assert "would probably tell" in unsure[7]


def test_benchmarks_refused_for_one_reason_share_a_row(tmp_path: Path) -> None:
    base, other = fake_runs.benchmarks(), fake_runs.benchmarks()
    for entry in other:
        entry["extra_info"]["fingerprint"] = {**fake_runs.PRINT, "gpu": "NVIDIA A100"}
    result = compare(
        load(fake_runs.save(tmp_path, "base", base)), load(fake_runs.save(tmp_path, "other", other, 2))
    )
    assert result.outcome is Outcome.ERROR
    [part] = parts(result)
    assert part.count == len(base)
    assert len(part.rows) == 1
    assert part.rows[0][0] == f"test_batch_size[1] and {len(base) - 1} more"
    assert "NVIDIA A100" in page([result.base, result.head], result)


def test_markdown_gives_the_verdict_first_and_folds_the_unchanged(judged: Comparison) -> None:
    text = markdown([judged.base, judged.head], judged)
    assert text.startswith("## ❌ FAIL: 2 regressions")
    order = [
        text.index(word) for word in ("### Regressions", "### Can't tell", "<details><summary>Unchanged")
    ]
    assert order == sorted(order)
    assert text.index("test_batch_size[slow]") < text.index("<details>")
    assert "test_batch_size[same]" not in text[: text.index("<details>")]
    assert text.count("<details>") == text.count("</details>") == 2


def test_markdown_of_a_run_alone_is_its_figures(head: Run) -> None:
    text = markdown([head])
    assert text.startswith("## All figures of head")
    assert "FAIL" not in text
    assert "PASS" not in text
    assert len(re.findall(r"^\| `", text, re.M)) == len(head.benchmarks)


def test_every_table_row_of_the_markdown_has_as_many_cells_as_its_heading(judged: Comparison) -> None:
    width = None
    for line in markdown([judged.base, judged.head], judged).splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            width = width or cells
            assert cells == width, line
        else:
            width = None


def test_the_terminal_ends_with_the_verdict(judged: Comparison) -> None:
    text = shown(comparison_table(judged))
    assert text.strip().splitlines()[-1].startswith("FAIL: 2 regressions")
    assert "test_batch_size[slow]" in text
    assert "test_batch_size[same]" not in text
    assert "test_batch_size[same]" in shown(runs_table([judged.head]))


def test_nothing_in_a_file_acts(tmp_path: Path) -> None:
    noise = fake_runs.random.Random(0)
    entries = [
        fake_runs.entry(name, "batch_size", noise, batch_size=2, **fake_runs.speeds(9.0, 2))
        for name in ("a", "b")
    ]
    for entry in entries:
        entry["fullname"] += EVIL
        entry["extra_info"] |= {"policy": EVIL + entry["name"], "void_reason": EVIL}
        entry["extra_info"]["fingerprint"] = {"gpu": EVIL}
    path = fake_runs.save(tmp_path, "base", entries, commit_info={"id": EVIL}, datetime=EVIL)
    run, other = load(path), load(fake_runs.save(tmp_path, "head", entries[:1], 2))
    result = compare(run, other)
    parsed = Page(page([other, run], result))
    assert {"script", "img", "link", "iframe", "a"}.isdisjoint(name for name, _ in parsed.elements)
    assert "<script>alert(1)</script>" in "".join(parsed.text)
    assert "{{ 7 * 7 }} {% x" in "".join(parsed.text)
    assert not {"\x1b", "\u202e"} & set("".join(parsed.text))
    summary = markdown([run], result)
    rendered = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(summary))
    allowed = {
        "h2",
        "h3",
        "p",
        "ul",
        "li",
        "code",
        "details",
        "summary",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {name for name, _ in rendered.elements} <= allowed
    assert "<script>alert(1)</script>" in "".join(rendered.text)
    assert "@team" not in re.sub(r"`[^`\n]*`", "", summary)
    assert "\x1b" not in shown(comparison_table(result)) + shown(runs_table([run])) + summary


def test_history_keeps_to_one_fingerprint(tmp_path: Path) -> None:
    runs = []
    for day in range(1, 5):
        entries = fake_runs.benchmarks(day, day)
        if day == 1:
            for entry in entries:
                entry["extra_info"]["fingerprint"] = {**fake_runs.PRINT, "driver": "570.1"}
        runs.append(load(fake_runs.save(tmp_path, "nightly", entries, day)))
    series, left_out = history(runs)
    assert left_out == len(runs[-1].benchmarks)
    rates = {b.fullname: values for b, metric, values in series if metric == "tokens_per_s"}
    assert rates["perf/benchmarks/test_policy.py::test_policy[dynamic]"] == [76_000.0, 114_000.0, 152_000.0]
    assert not {metric for _, metric, _ in series} & set(fake_runs.EXACT)
    text = page(runs)
    assert "4 runs, from 2026-11-01 02:10 to 2026-11-04 02:10" in text
    assert f"{left_out} earlier results are left out" in text
    assert "History" not in page(runs[-1:])


def test_the_csv_reads_back_in_pandas(judged: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert write([judged.base, judged.head], csv=path) == [path]
    table = pd.read_csv(path)
    assert len(table) == len(judged.base.benchmarks) + len(judged.head.benchmarks)
    row = table[(table["run"] == "head") & (table["benchmark"].str.endswith("[slow]"))].iloc[0]
    recorded = judged.head.benchmarks[row["benchmark"]]
    assert row["tokens_per_s"] == recorded.info["tokens_per_s"]
    assert tuple(json.loads(row["rounds.tokens_per_s"])) == recorded.rounds["tokens_per_s"]
    assert row["fingerprint.gpu"] == "NVIDIA H200"
    assert list(frame([judged.head])["run"].unique()) == ["head"]


def test_write_writes_what_is_asked_for(judged: Comparison, tmp_path: Path) -> None:
    runs, whole, text = [judged.base, judged.head], tmp_path / "a.html", tmp_path / "a.md"
    assert write(runs, judged, html=whole, markdown=text) == [whole, text]
    assert whole.read_text(encoding="utf-8") == page(runs, judged)
    assert text.read_text(encoding="utf-8") == markdown(runs, judged)
    assert write(runs, judged) == []
    with pytest.raises(OSError, match="nowhere"):
        write(runs, csv=tmp_path / "nowhere" / "a.csv")


def test_reading_and_reporting_need_no_torch() -> None:
    code = "import sys, perf.report, perf.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


numbers = st.floats(1e-6, 1e12)


def test_numbers_as_people_read_them() -> None:
    values = [0, 3.0, 0.123456, 12.345, 999.96, 1234.5, 1e6, None, True, "text"]
    assert [number(value) for value in values] == [
        "0", "3", "0.1235", "12.35", "1000", "1,234", "1,000,000", "-", "on", "text",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [(5e-324, 1.7e308), (1.7e308, 5e-324)])
def test_numbers_at_the_ends_of_what_a_float_holds_are_reported(tmp_path, values):
    noise = random.Random(0)
    for count, value in enumerate(values, 1):
        measured = fake_runs.entry("8", "batch_size", noise, batch_size=8, canary_copy_gbps=value)
        measured["extra_info"] |= {"tokens_per_s": value, "tpot_p50_ms": value}
        measured["extra_info"]["rounds"] |= {"tokens_per_s": [value] * 5, "tpot_p50_ms": [value] * 5}
        fake_runs.save(tmp_path, f"run{count}", [measured], count)
    base, head = (fake_runs.several(load(path)) for path in sorted(tmp_path.glob("*.json")))
    comparison = compare(base, head)
    assert comparison.outcome is Outcome.FAIL
    assert page([base, head], comparison)
    assert markdown([base, head], comparison)
