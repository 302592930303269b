"""Reports: what is shown, in which order, that nothing from a file acts, and that the pages need no
network."""

from __future__ import annotations

import html
import io
import json
import random
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import example, given, strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from rich.cells import cell_len
from rich.console import Console

from perf import report
from perf.gate.comparison import Comparison, Outcome
from perf.gate.saved_runs import Run, load
from perf.gate.verdict import compare
from perf.report import comparison_table, frame, markdown, page, runs_table, write
from perf.report.charts import DIGIT, HEIGHT, LETTERS, WIDTH, Bar, Chart, Line, log_ticks, ticks
from perf.report.figures import history, sections
from perf.report.page import templates
from perf.report.text import clean, number
from perf.report.verdicts import headline, parts
from tests.perf import fake_runs

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
    return compare(*runs)


def scale(entry: dict[str, Any], metric: str, by: list[float]) -> None:
    rounds = entry["extra_info"]["rounds"]
    rounds[metric] = [value * factor for value, factor in zip(rounds[metric], by, strict=True)]
    entry["extra_info"][metric] = rounds[metric][0]


def shown(renderable: Any, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(renderable)
    return out.getvalue()


def drawn(chart: Chart) -> str:
    """The chart's figure in HTML."""
    figure: Any = templates().get_template("charts.html.j2").module
    return str(figure.figure(chart, "k"))


class Page(HTMLParser):
    """A page taken apart: its elements with attributes, and an error for any tag left open or closed
    twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name != "meta":
            self._open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.elements if found == name]


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
    assert slow[1:] == ("tokens/s", "997", "797", "-20.0%", slow[5], "3.0%", slow[7])
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


def test_the_page_asks_for_nothing_and_runs_nothing(head: Run) -> None:
    text = page([head])
    parsed = Page(text)
    assert not {"src", "href", "onclick", "onload", "style"} & {
        key for _, attrs in parsed.elements for key in attrs
    }
    assert "url(" not in text
    assert "@import" not in text
    policies = [
        meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_chart_says_what_it_shows_and_gives_its_numbers(head: Run) -> None:
    parsed = Page(page([head]))
    charts = [attrs for _, attrs in parsed.elements if "aria-labelledby" in attrs]
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(charts) == len(parsed.all("figure")) == sum(map(len, sections(head).values()))
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert chart["role"] == "img"
        assert {chart["aria-labelledby"], chart["aria-describedby"]} <= set(ids)
    for figure in page([head]).split("<figure>")[1:]:
        assert "<table>" in figure
    assert "tokens/s against batch size. continuous: 3,478 at 1; 136,080 at 256." in "".join(parsed.text)
    assert "sequential: 2,900; dynamic: 38,000; continuous: 61,000." in "".join(parsed.text)


def test_a_whole_suite_has_every_chart(head: Run) -> None:
    titles = {heading: [chart.title for chart in charts] for heading, charts in sections(head).items()}
    times = ["TTFT, ms", "TPOT, ms", "Latency, ms"]
    assert titles == {
        "Throughput": ["Throughput", "Policies", "Peers", "Model scale"],
        "Latency": times,
        "Open load": ["Throughput and latency", "Goodput", *times],
        "How far from the limit": ["Decode roofline", "Prefill roofline"],
        "Memory and start-up": ["Start-up"],
    }


def test_charts_show_what_was_recorded(head: Run, tmp_path: Path) -> None:
    base = load(fake_runs.save(tmp_path, "base", fake_runs.benchmarks(1, 0.5)))
    throughput, policies, *_ = sections(head, base)["Throughput"]
    name = "perf/benchmarks/test_batch_size.py::test_batch_size[{}]"
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    expected = tuple((float(size), head.benchmarks[name.format(size)].info["tokens_per_s"]) for size in sizes)
    assert [(line.name, line.of) for line in throughput.lines] == [
        ("continuous", None),
        ("continuous (base)", "continuous"),
    ]
    assert throughput.lines[0].points == expected
    assert [(bar.name, bar.value, bar.before, bar.note) for bar in policies.bars] == [
        ("sequential", 2900.0, 1450.0, "(1.00x)"),
        ("dynamic", 38000.0, 19000.0, "(13.10x)"),
        ("continuous", 61000.0, 30500.0, "(21.03x)"),
    ]
    decode, prefill = sections(head)["How far from the limit"]
    assert [bar.name for bar in decode.bars][:2] == [
        "batch size 1, context 512",
        "batch size 32, context 512",
    ]
    assert decode.full == prefill.full == 100.0


def test_what_only_the_earlier_run_has_is_a_line_of_its_own(tmp_path: Path) -> None:
    noise = fake_runs.random.Random(0)
    some = [
        fake_runs.entry(way, "batch_size", noise, batch_size=8, policy=way, **fake_runs.speeds(1000.0, 8))
        for way in ("continuous", "dynamic")
    ]
    base = load(fake_runs.save(tmp_path, "base", some))
    head = load(fake_runs.save(tmp_path, "head", some[:1], 2))
    [chart] = sections(head, base)["Throughput"]
    assert [(line.name, line.of) for line in chart.lines] == [
        ("continuous", None),
        ("continuous (base)", "continuous"),
        ("dynamic (base)", None),
    ]
    assert "dynamic (base): 1,000 at 8" in page([base, head], compare(base, head))


def test_a_percentile_that_was_not_recorded_has_no_line(tmp_path: Path) -> None:
    rates = {"offered_rate": 4.0, "tokens_per_s": 3.0, "latency_p50_ms": 2.0}
    run = load(
        fake_runs.save(tmp_path, "load", [fake_runs.entry("4", "load", fake_runs.random.Random(0), **rates)])
    )
    curve, latency = sections(run)["Open load"]
    assert [[line.name for line in chart.lines] for chart in (curve, latency)] == [["P50"], ["P50"]]
    assert "P50: 2 at 3" in page([run])


def test_a_run_without_groups_still_has_a_page(tmp_path: Path) -> None:
    plain = {
        "fullname": "tests/test_a.py::test_a",
        "group": None,
        "stats": {"data": [0.1, 0.2, 0.3]},
        "extra_info": {},
    }
    nulls = fake_runs.entry("x", "batch_size", fake_runs.random.Random(0), batch_size=4, tokens_per_s=None)
    run = load(fake_runs.save(tmp_path, "plain", [plain, nulls]))
    assert sections(run) == {}
    assert "test_a" in page([run])
    assert "0.2" in shown(runs_table([run]))


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


@given(numbers, numbers)
@example(1e-6, 1.0000000000000002e-6)
@example(5.0, 5.0)
def test_ticks_cover_what_they_are_for(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for found in (ticks(low, high), ticks(0.0, high), log_ticks(low, high)):
        assert found == sorted(set(found))
        assert len(found) >= 2
        assert found[-1] >= high * (1 - 1e-9)
    assert ticks(low, high)[0] <= low * (1 + 1e-9)
    assert log_ticks(low, high)[0] <= low * (1 + 1e-9)
    assert len(ticks(low, high)) <= 8


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.booleans(), st.booleans())
@example([(1.0, 1.7e308), (2.0, 1e300)], False, False)
@example([(1.0, 5.5), (2.0, 1.2e8)], False, True)
def test_lines_stay_inside_their_picture(points: list[tuple[float, float]], log_x: bool, log_y: bool) -> None:
    lines = (Line("a", tuple(sorted(points))), Line("b", tuple(points[:1]), "a"))
    svg = drawn(Chart("t", "s", "ms", "x", lines, log_x=log_x, log_y=log_y))
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg)]
    assert len(places) == len(points) + 1
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    labels = re.findall(r'<text class="end" x="([^"]+)" y="([^"]+)">([^<]+)<', svg)
    assert len(labels) >= 2
    assert all(float(x) >= DIGIT * len(label) for x, _, label in labels)
    assert all(float(low) - float(high) >= LETTERS for (_, high, _), (_, low, _) in pairwise(labels))


@given(st.lists(numbers, min_size=1, max_size=60, unique=True), st.booleans())
def test_labels_below_a_plot_touch_neither_each_other_nor_the_edge(xs: list[float], log_x: bool) -> None:
    svg = drawn(Chart("t", "s", "ms", "x", (Line("a", tuple((x, 1.0) for x in sorted(xs))),), log_x=log_x))
    labels = re.findall(r'<text x="([^"]+)" y="225">([^<]+)<', svg)
    edges = [float(x) + side * len(label) * DIGIT / 2 for x, label in labels for side in (-1, 1)]
    assert edges == sorted(edges)
    assert edges[-1] <= WIDTH + 1e-6


@given(
    st.lists(
        st.tuples(st.text(max_size=90), st.floats(0, 1e9), st.none() | st.floats(0, 1e9)),
        min_size=1,
        max_size=9,
    )
)
@example([("", 5e-324, None)])
@example([("表" * 90, 1.7e308, 1.0)])
def test_bars_stay_inside_their_picture_and_keep_their_names(
    some: list[tuple[str, float, float | None]],
) -> None:
    text = drawn(Chart("t", "s", "tokens/s", bars=tuple(Bar(*bar) for bar in some)))
    parsed = Page(text)
    assert all(0 <= float(bar["width"] or -1) <= WIDTH for bar in parsed.all("rect"))
    for name, _, _ in some:
        assert clean(name) in "".join(parsed.text)
    for label, value in re.findall(r'<p><span title="[^"]*">([^<]*)</span> <span>([^<]*)<', text):
        assert cell_len(html.unescape(label)) + len(value) <= 48


@given(st.text())
def test_a_template_lets_no_text_out(text: str) -> None:
    parsed = Page(templates().from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text))
    assert [name for name, _ in parsed.elements] == ["p"]
    assert "".join(parsed.text) == clean(text) == parsed.all("p")[0]["title"]


def test_a_template_that_is_given_too_little_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        templates().get_template("page.html.j2").render()


def test_what_the_page_is_made_of_is_packaged() -> None:
    room = Path(report.__file__).parent
    project = tomllib.loads((room.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["perf"]
    beside = {path for path in room.iterdir() if path.is_file() and path.suffix != ".py"}
    assert {path.name for path in beside} == {"charts.html.j2", "page.css", "page.html.j2"}
    assert beside <= {path for pattern in patterns for path in room.parent.glob(pattern)}


def test_numbers_as_people_read_them() -> None:
    values = [0, 3.0, 0.123456, 12.345, 999.96, 1234.5, 1e6, None, True, "text"]
    assert [number(value) for value in values] == [
        "0", "3", "0.1235", "12.35", "1000", "1,234", "1,000,000", "-", "on", "text",
    ]  # fmt: skip


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
    parts_ = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts_)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme: int) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for lines."""
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    block = style.split(":root {")[scheme + 1].split("}")[0]
    colours = dict(re.findall(r"--(\w+): (#\w+)", block))
    for name, colour in colours.items():
        for ground in ("ground", "card"):
            dark, light = sorted((luminance(colour), luminance(colours[ground])))
            least = {"ground": 0, "card": 0, "rule": 0}.get(name, 3.0 if name[1:].isdigit() else 4.5)
            assert (light + 0.05) / (dark + 0.05) >= least, f"{name} on {ground}"


@pytest.mark.parametrize("values", [(5e-324, 1.7e308), (1.7e308, 5e-324)])
def test_numbers_at_the_ends_of_what_a_float_holds_are_reported(tmp_path, values):
    noise = random.Random(0)
    for count, value in enumerate(values, 1):
        measured = fake_runs.entry("8", "batch_size", noise, batch_size=8, canary_copy_gbps=value)
        measured["extra_info"] |= {"tokens_per_s": value, "tpot_p50_ms": value}
        measured["extra_info"]["rounds"] |= {"tokens_per_s": [value] * 5, "tpot_p50_ms": [value] * 5}
        fake_runs.save(tmp_path, f"run{count}", [measured], count)
    base, head = (load(path) for path in sorted(tmp_path.glob("*.json")))
    comparison = compare(base, head)
    assert comparison.outcome is Outcome.FAIL
    assert page([base, head], comparison)
    assert markdown([base, head], comparison)
